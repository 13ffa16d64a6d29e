// bits.h - raw loads and stores, and the 16-bit float conversions.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

namespace xe {
template <class T> inline T rd(const void *p) { T v; memcpy(&v, p, sizeof v); return v; }
template <class T> inline void wr(void *p, T v) { memcpy(p, &v, sizeof v); }

inline float bf2f(uint16_t b) { return std::bit_cast<float>((uint32_t)b << 16); }
inline uint16_t f2bf(float f) {      // round to nearest even
  uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)((u >> 16) | 0x40);
  return (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}
inline float hf2f(uint16_t h) { return (float)std::bit_cast<_Float16>(h); }
inline uint16_t f2hf(float f) { return std::bit_cast<uint16_t>((_Float16)f); }
inline uint16_t d2hf(double f) { return std::bit_cast<uint16_t>((_Float16)f); }
}  // namespace xe
