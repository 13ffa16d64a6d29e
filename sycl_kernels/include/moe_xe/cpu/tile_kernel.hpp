// The inner loop on AMX's tiles: up to 32 rows times a panel of 32 columns, of packed operands or of weights as they lie in memory.
#pragma once
#include <moe_xe/cpu/micro_kernel.hpp>
#include <moe_xe/cpu/tile_registers.hpp>
#include <type_traits>

namespace moe_xe {

constexpr int tile_k = elements_per_step * tile_side;    // elements of K of a tile
constexpr int summed_tiles = 32;         // as summed_steps: products along K that a register sums
constexpr int block_side = 2 * tile_side;
static_assert(!tiled || ((float_pairs || int8_quads) && width == tile_side && config::micro_rows == block_side && config::micro_columns == block_side));

// What a main loop needs of the processor.
struct NoRegisters {};
using Registers = std::conditional_t<tiled, TileRegisters, NoRegisters>;

// Two tiles of an operand side by side, and those that follow along K. The left operand's have rows of 32 elements of K, the right
// one's a row for each pair of them.
struct TilePair {
  const void* first;
  const void* second;
  int64 stride;    // bytes between rows
  int64 step;      // bytes to the next tile along K

  const void* at(const void* tile, int64 number) const { return static_cast<const char*>(tile) + number * step; }
};

// sums: left's tiles times right's, [32][32]. ahead: how many bytes behind left's rows others will be wanted, or 0.
template <int left_tiles, int right_tiles>
void multiply_tiles(TileRegisters& tiles, const TilePair& left, const TilePair& right, int begin, int end, int64 ahead, float* sums) {
  tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    const void *upper = left.at(left.first, step), *lower = left.at(left.second, step);
    tiles.load<4>(upper, left.stride);
    tiles.load<6>(right.at(right.first, step), right.stride);
    tiles.add_product<0, 4, 6>();
    if constexpr (left_tiles > 1) {
      tiles.load<5>(lower, left.stride);
      tiles.add_product<2, 5, 6>();
    }
    if constexpr (right_tiles > 1) {
      tiles.load<7>(right.at(right.second, step), right.stride);
      tiles.add_product<1, 4, 7>();
      if constexpr (left_tiles > 1) tiles.add_product<3, 5, 7>();
    }
    if (ahead != 0)
#pragma unroll 1
      for (int64 row = 0, at = ahead; row < tile_side; ++row, at += left.stride) {
        prefetch(static_cast<const char*>(upper) + at);
        prefetch(static_cast<const char*>(lower) + at);
      }
  }
  constexpr int64 stride = 4 * block_side;
  tiles.store<0>(sums, stride);
  if constexpr (right_tiles > 1) tiles.store<1>(sums + tile_side, stride);
  if constexpr (left_tiles > 1) {
    tiles.store<2>(sums + tile_side * block_side, stride);
    if constexpr (right_tiles > 1) tiles.store<3>(sums + tile_side * block_side + tile_side, stride);
  }
}

// `rows` rows, up to 32, times 32 columns, added to `from`, which null makes zero; so many tiles along K. Whole tiles of rows are written.
// rows_are_left: which operand the rows are; sums of the other kind are transposed.
template <bool rows_are_left>
void multiply(TileRegisters& tiles, int rows, const TilePair& row_tiles, const TilePair& column_tiles, int steps, int64 ahead,
              SumsInMemory from, SumsInMemory to) {
  alignas(64) float sums[block_side * block_side];
  int begin = 0;
  do {   // once without steps, too: zeros
    const int end = steps - begin > summed_tiles ? begin + summed_tiles : steps;
    if (rows > tile_side) {
      if constexpr (rows_are_left) multiply_tiles<2, 2>(tiles, row_tiles, column_tiles, begin, end, 0, sums);
      else multiply_tiles<2, 2>(tiles, column_tiles, row_tiles, begin, end, ahead, sums);
    } else {
      if constexpr (rows_are_left) multiply_tiles<1, 2>(tiles, row_tiles, column_tiles, begin, end, 0, sums);
      else multiply_tiles<2, 1>(tiles, column_tiles, row_tiles, begin, end, ahead, sums);
    }
#pragma unroll 1
    for (int row = 0; row < rows; row += tile_side)
#pragma unroll 1
      for (int column = 0; column < block_side; column += tile_side) {
        const float* tile = sums + (rows_are_left ? row * block_side + column : column * block_side + row);
        Dwords values[width];
#pragma unroll
        for (int i = 0; i < width; ++i) values[i] = load<Dwords>(tile + i * block_side);
        if constexpr (!rows_are_left) transpose(values);
#pragma unroll
        for (int i = 0; i < width; ++i) {
          Sums value = __builtin_bit_cast(Sums, values[i]);
          if (from.first) value += load<Sums>(from.first + (row + i) * from.stride + column);
          store(to.first + (row + i) * to.stride + column, value);
        }
      }
    from = to;
    begin = end;
  } while (begin < steps);
}

}  // namespace moe_xe
