// AMX: eight registers of 16 rows of 64 bytes, and products of two of them.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

constexpr int tile_side = 16;    // rows, and dwords of a row

// The processor's registers, all of one shape, from here to the end of the scope.
class TileRegisters {
 public:
  TileRegisters() {
    struct Shape {
      unsigned char palette = 1, start_row = 0, reserved[14] = {};
      unsigned short row_bytes[16] = {};
      unsigned char rows[16] = {};
    } shape;
#pragma unroll 1
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = 4 * tile_side;
      shape.rows[tile] = tile_side;
    }
    asm volatile("ldtilecfg (%0)" : : "r"(&shape) : "memory");
  }
  ~TileRegisters() { asm volatile("tilerelease" : : : "memory"); }
  TileRegisters(const TileRegisters&) = delete;

  template <int tile> void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(tile)); }

  // Rows are `stride` bytes apart.
  template <int tile> void load(const void* from, int64 stride) {
    asm volatile("tileloadd (%1,%2,1),%%tmm%c0" : : "i"(tile), "r"(from), "r"(stride) : "memory");
  }
  template <int tile> void store(void* to, int64 stride) {
    asm volatile("tilestored %%tmm%c0,(%1,%2,1)" : : "i"(tile), "r"(to), "r"(stride) : "memory");
  }

  // sum[i][j] += a[i][p] * b[p][j], where p are pairs of bf16 or fp16 along K, or quads of int8, whose sums are int32.
  template <int sum, int a, int b> void add_product() {
    if constexpr (problem::input == Dtype::i8) asm volatile("tdpbssd %%tmm%c2,%%tmm%c1,%%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
    else if constexpr (problem::input == Dtype::f16) asm volatile("tdpfp16ps %%tmm%c2,%%tmm%c1,%%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
    else asm volatile("tdpbf16ps %%tmm%c2,%%tmm%c1,%%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
  }
};

}  // namespace moe_xe
