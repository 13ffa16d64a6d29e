// Stands in for the header of the same name, so that what is around AMX's instructions runs on a CPU without them.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

constexpr int tile_side = 16;

class TileRegisters {
 public:
  template <int tile> void zero() {
#pragma unroll 1
    for (int i = 0; i < tile_side * tile_side; ++i) registers[tile][i] = 0;
  }
  template <int tile> void load(const void* from, int64 stride) {
#pragma unroll 1
    for (int row = 0; row < tile_side; ++row)
      __builtin_memcpy(registers[tile] + row * tile_side, static_cast<const char*>(from) + row * stride, 4 * tile_side);
  }
  template <int tile> void store(void* to, int64 stride) {
#pragma unroll 1
    for (int row = 0; row < tile_side; ++row)
      __builtin_memcpy(static_cast<char*>(to) + row * stride, registers[tile] + row * tile_side, 4 * tile_side);
  }
  template <int sum, int a, int b> void add_product() {
#pragma unroll 1
    for (int i = 0; i < tile_side; ++i)
#pragma unroll 1
      for (int p = 0; p < tile_side; ++p)
#pragma unroll 1
        for (int j = 0; j < tile_side; ++j) {
          const unsigned x = registers[a][i * tile_side + p], y = registers[b][p * tile_side + j];
          unsigned& to = registers[sum][i * tile_side + j];
          if (problem::input == Dtype::i8) {
            for (int byte = 0; byte < 32; byte += 8) to += int(static_cast<signed char>(x >> byte)) * int(static_cast<signed char>(y >> byte));
            continue;
          }
          const float low = number(x & 0xffffu) * number(y & 0xffffu), high = number(x >> 16) * number(y >> 16);
          to = __builtin_bit_cast(unsigned, __builtin_bit_cast(float, to) + low + high);
        }
  }

 private:
  // Of bf16 or fp16.
  static float number(unsigned bits) {
    if constexpr (problem::input == Dtype::f16) return __builtin_bit_cast(_Float16, static_cast<unsigned short>(bits));
    else return __builtin_bit_cast(float, bits << 16);
  }

  unsigned registers[8][tile_side * tile_side];
};

}  // namespace moe_xe
