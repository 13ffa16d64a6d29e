// operands.h - reads the sources of an ALU instruction into arrays of lanes and writes its result back.
#pragma once
#include "bits.h"
#include "exec.h"
#include <cmath>
#include <limits>

namespace xe {
inline const uint8_t *laneAddr(const Thread &t, const Opnd &o, int i) {
  if (o.kind != Opnd::Ind) return t.r + o.base + o.off[i];
  int a = o.V < 0 ? o.aSub + i / o.W : o.aSub;
  uint32_t x = rd<uint16_t>(t.r + ARF_A + a * 2) + o.aImm + o.off[i];
  if (x + 8 > (uint32_t)NGRF * GRF) throw Error("indirect register access outside the register file");
  return t.r + x;
}

template <class T, class R, class C> inline void gather(const Thread &t, const Opnd &o, int n, R *out, C cvt) {
  if (o.kind == Opnd::Ind) { for (int i = 0; i < n; ++i) out[i] = cvt(rd<T>(laneAddr(t, o, i))); return; }
  const uint8_t *p = t.r + o.base;
  if (o.shape == Opnd::Contig) for (int i = 0; i < n; ++i) out[i] = cvt(rd<T>(p + i * sizeof(T)));
  else if (o.shape == Opnd::Scalar) { R v = cvt(rd<T>(p)); for (int i = 0; i < n; ++i) out[i] = v; }
  else for (int i = 0; i < n; ++i) out[i] = cvt(rd<T>(p + o.off[i]));
}

// packed vector immediates
inline int64_t vecImm(const Opnd &o, int i) {
  int nib = (int)(o.imm >> (4 * (i & 7))) & 15;
  return o.ty == V ? (nib ^ 8) - 8 : nib;
}
inline float vfImm(const Opnd &o, int i) {
  int b = (int)(o.imm >> (8 * (i & 3))) & 255;
  if ((b & 0x7F) == 0) return b & 0x80 ? -0.f : 0.f;
  float v = std::ldexp(1.f + (b & 15) / 16.f, ((b >> 4) & 7) - 3);
  return b & 0x80 ? -v : v;
}

// integer value of a source, sign- or zero-extended to 64 bits
inline void loadI(const Thread &t, const Opnd &o, int n, int64_t *out, bool logic) {
  auto id = [](auto v) { return (int64_t)v; };
  if (o.kind == Opnd::Imm) {
    if (o.ty == V || o.ty == UV) for (int i = 0; i < n; ++i) out[i] = vecImm(o, i);
    else for (int i = 0; i < n; ++i) out[i] = (int64_t)o.imm;
  } else switch (o.ty) {
    case UB: gather<uint8_t>(t, o, n, out, id); break;
    case B: gather<int8_t>(t, o, n, out, id); break;
    case UW: case HF: case BF: gather<uint16_t>(t, o, n, out, id); break;
    case W: gather<int16_t>(t, o, n, out, id); break;
    case UD: case F: gather<uint32_t>(t, o, n, out, id); break;
    case D: gather<int32_t>(t, o, n, out, id); break;
    case UQ: case Q: case DF: gather<int64_t>(t, o, n, out, id); break;
    default: throw Error("integer source type");
  }
  if (o.abs) for (int i = 0; i < n; ++i) out[i] = out[i] < 0 ? -out[i] : out[i];
  if (o.neg) {
    if (logic) for (int i = 0; i < n; ++i) out[i] = ~out[i];
    else for (int i = 0; i < n; ++i) out[i] = -out[i];
  }
}

// floating-point value of a source; R = float or double
template <class R> void loadR(const Thread &t, const Opnd &o, int n, R *out) {
  auto num = [](auto v) { return (R)v; };
  if (o.kind == Opnd::Imm) {
    if (o.ty == VF) { for (int i = 0; i < n; ++i) out[i] = vfImm(o, i); }
    else {
      R v;
      switch (o.ty) {
        case F: v = std::bit_cast<float>((uint32_t)o.imm); break;
        case DF: v = (R)std::bit_cast<double>(o.imm); break;
        case HF: v = hf2f((uint16_t)o.imm); break;
        case BF: v = bf2f((uint16_t)o.imm); break;
        case UQ: v = (R)o.imm; break;
        default: v = (R)(int64_t)o.imm;
      }
      for (int i = 0; i < n; ++i) out[i] = (o.ty == V || o.ty == UV) ? (R)vecImm(o, i) : v;
    }
  } else switch (o.ty) {
    case F: gather<float>(t, o, n, out, num); break;
    case DF: gather<double>(t, o, n, out, num); break;
    case HF: gather<uint16_t>(t, o, n, out, [](uint16_t v) { return (R)hf2f(v); }); break;
    case BF: gather<uint16_t>(t, o, n, out, [](uint16_t v) { return (R)bf2f(v); }); break;
    case UB: gather<uint8_t>(t, o, n, out, num); break;
    case B: gather<int8_t>(t, o, n, out, num); break;
    case UW: gather<uint16_t>(t, o, n, out, num); break;
    case W: gather<int16_t>(t, o, n, out, num); break;
    case UD: gather<uint32_t>(t, o, n, out, num); break;
    case D: gather<int32_t>(t, o, n, out, num); break;
    case UQ: gather<uint64_t>(t, o, n, out, num); break;
    case Q: gather<int64_t>(t, o, n, out, num); break;
    default: throw Error("float source type");
  }
  if (o.abs) for (int i = 0; i < n; ++i) out[i] = std::fabs(out[i]);
  if (o.neg) for (int i = 0; i < n; ++i) out[i] = -out[i];
}

template <class T, class R, class C> inline void scatter(Thread &t, const Opnd &o, int n, uint32_t m, const R *v, C cvt) {
  uint8_t *p;
  if (o.kind == Opnd::Ind) {
    for (int i = 0; i < n; ++i) if (m >> i & 1) wr<T>(const_cast<uint8_t *>(laneAddr(t, o, i)), cvt(v[i]));
    return;
  }
  p = t.r + o.base;
  uint32_t all = n == 32 ? ~0u : (1u << n) - 1;
  if ((m & all) == all && o.shape == Opnd::Contig) for (int i = 0; i < n; ++i) wr<T>(p + i * sizeof(T), cvt(v[i]));
  else for (int i = 0; i < n; ++i) if (m >> i & 1) wr<T>(p + o.off[i], cvt(v[i]));
}

inline int accIdx(const Opnd &o) { return (int)(o.base - ARF_ACC) / 4; }

inline void storeI(Thread &t, const Inst &I, uint32_t m, int64_t *v) {
  const Opnd &o = I.dst;
  int n = I.n;
  if (o.kind == Opnd::Null) return;
  if (o.isAcc && tySize(o.ty) == 4) for (int i = 0; i < n; ++i) if (m >> i & 1) t.acc64[accIdx(o) + i] = v[i];
  if (I.sat && !isFloat(o.ty)) {
    int64_t lo = 0, hi = 0;
    switch (o.ty) {
      case UB: hi = 255; break; case B: lo = -128; hi = 127; break;
      case UW: hi = 65535; break; case W: lo = -32768; hi = 32767; break;
      case UD: hi = 0xFFFFFFFFll; break; case D: lo = INT32_MIN; hi = INT32_MAX; break;
      default: throw Error("saturation of 64-bit integers is not supported");
    }
    for (int i = 0; i < n; ++i) v[i] = v[i] < lo ? lo : v[i] > hi ? hi : v[i];
  }
  switch (o.ty) {
    case UB: case B: scatter<uint8_t>(t, o, n, m, v, [](int64_t x) { return (uint8_t)x; }); break;
    case UW: case W: scatter<uint16_t>(t, o, n, m, v, [](int64_t x) { return (uint16_t)x; }); break;
    case UD: case D: scatter<uint32_t>(t, o, n, m, v, [](int64_t x) { return (uint32_t)x; }); break;
    case UQ: case Q: scatter<uint64_t>(t, o, n, m, v, [](int64_t x) { return (uint64_t)x; }); break;
    case F: scatter<float>(t, o, n, m, v, [](int64_t x) { return (float)x; }); break;
    case DF: scatter<double>(t, o, n, m, v, [](int64_t x) { return (double)x; }); break;
    case HF: scatter<uint16_t>(t, o, n, m, v, [](int64_t x) { return d2hf((double)x); }); break;
    default: throw Error("integer destination type");
  }
}

template <class T, class R> inline T toInt(R v) {  // truncation, clamped, NaN -> 0
  if (v != v) return 0;
  constexpr R lo = (R)std::numeric_limits<T>::min(), hi = (R)std::numeric_limits<T>::max();
  if (v <= lo) return std::numeric_limits<T>::min();
  if (v >= hi) return std::numeric_limits<T>::max();
  return (T)v;
}

template <class R> void storeR(Thread &t, const Inst &I, uint32_t m, R *v) {
  const Opnd &o = I.dst;
  int n = I.n;
  if (o.kind == Opnd::Null) return;
  if (I.sat && isFloat(o.ty)) for (int i = 0; i < n; ++i) v[i] = v[i] != v[i] ? 0 : v[i] < 0 ? 0 : v[i] > 1 ? 1 : v[i];
  switch (o.ty) {
    case F: scatter<float>(t, o, n, m, v, [](R x) { return (float)x; }); break;
    case DF: scatter<double>(t, o, n, m, v, [](R x) { return (double)x; }); break;
    case HF: scatter<uint16_t>(t, o, n, m, v, [](R x) { return sizeof(R) == 8 ? d2hf(x) : f2hf((float)x); }); break;
    case BF: scatter<uint16_t>(t, o, n, m, v, [](R x) { return f2bf((float)x); }); break;
    case UB: scatter<uint8_t>(t, o, n, m, v, [](R x) { return toInt<uint8_t>(x); }); break;
    case B: scatter<int8_t>(t, o, n, m, v, [](R x) { return toInt<int8_t>(x); }); break;
    case UW: scatter<uint16_t>(t, o, n, m, v, [](R x) { return toInt<uint16_t>(x); }); break;
    case W: scatter<int16_t>(t, o, n, m, v, [](R x) { return toInt<int16_t>(x); }); break;
    case UD: scatter<uint32_t>(t, o, n, m, v, [](R x) { return toInt<uint32_t>(x); }); break;
    case D: scatter<int32_t>(t, o, n, m, v, [](R x) { return toInt<int32_t>(x); }); break;
    case UQ: scatter<uint64_t>(t, o, n, m, v, [](R x) { return toInt<uint64_t>(x); }); break;
    case Q: scatter<int64_t>(t, o, n, m, v, [](R x) { return toInt<int64_t>(x); }); break;
    default: throw Error("float destination type");
  }
}

template <class T> inline bool cond(Cmod c, T a, T b) {
  switch (c) {
    case CM_EQ: return a == b; case CM_NE: return a != b; case CM_GT: return a > b;
    case CM_GE: return a >= b; case CM_LT: return a < b; case CM_LE: return a <= b;
    case CM_UN: return a != a || b != b;
    default: throw Error("condition modifier");
  }
}
template <class T> uint32_t condMask(Cmod c, int n, const T *a, const T *b) {
  uint32_t r = 0;
  for (int i = 0; i < n; ++i) r |= (uint32_t)cond(c, a[i], b[i]) << i;
  return r;
}
}  // namespace xe
