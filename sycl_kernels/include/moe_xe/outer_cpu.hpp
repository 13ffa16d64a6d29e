// A tile of the weights' gradient on the CPU device: a block of sorted rows at a time, left's columns are packed in blocks
// of the micro-kernel's height, then each panel of right's columns is packed and multiplied with all of them. The sums of
// one element are always added in the same order.
#pragma once
#include <moe_xe/micro_kernel_cpu.hpp>
#include <moe_xe/outer_types.hpp>
#include <moe_xe/team_cpu.hpp>

namespace moe_xe {

constexpr int sums_stride = int(round_up(config::tile_columns, config::micro_columns));
// A sorted row of a packed block of left: micro_rows columns in whole vectors. Blocks are a row more apart than they are
// long: a power of two would map them to the same cache sets.
constexpr int left_step = int(round_up(config::micro_rows, width));
constexpr int64 left_block = (config::row_block + 1) * left_step;

// A work-group's scratch, in floats.
constexpr int64 packed_left_floats = round_up(round_up(config::tile_rows, config::micro_rows) / config::micro_rows * left_block, 16);
constexpr int64 panel_floats = round_up(config::row_block * config::micro_columns, 16);
constexpr int64 sums_floats = config::tile_rows * sums_stride;
static_assert(config::micro_columns % width == 0 && !bf16_pairs);
static_assert(4 * (packed_left_floats + panel_floats + sums_floats) <= config::scratch_bytes, "OuterCpuConfig.scratch_bytes");

class OuterMainloop {
 public:
  OuterMainloop(const OuterArguments& arguments, const Team& team) : args(arguments) {
    auto* scratch = static_cast<char*>(args.scratch) + team.group * config::scratch_bytes;
    packed_left = reinterpret_cast<float*>(scratch);
    panel = reinterpret_cast<Floats*>(packed_left + packed_left_floats);
    sums = packed_left + packed_left_floats + panel_floats;
  }

  void run(const OuterTile& tile) const {
    if (problem::accumulate && tile.begin == tile.end) return;
    const int rows = lesser(problem::p - tile.row, config::tile_rows), columns = lesser(problem::q - tile.column, config::tile_columns);
    // Blocks of equal height: 15 rows are 8 + 7, not 14 + 1.
    const int blocks = (rows + config::micro_rows - 1) / config::micro_rows;
    const int height = (rows + blocks - 1) / blocks;
    float finished[config::micro_rows * config::micro_columns];
    int64 begin = tile.begin;
    do {   // once for a tile without sorted rows, too: zeros
      const int depth = lesser(tile.end - begin, config::row_block);
      const bool last = begin + depth == tile.end;
      pack_left(begin, depth, tile.row, rows, height);
#pragma unroll 1
      for (int column = 0; column < columns; column += config::micro_columns) {
        pack_right(begin, depth, tile.column + column);
#pragma unroll 1
        for (int row = 0, block = 0; row < rows; row += height, ++block) {
          const int count = lesser(rows - row, height);
          const SumsInMemory partial{sums + row * sums_stride + column, sums_stride};
          const SumsInMemory done{finished, config::micro_columns};
          multiply<config::micro_rows, 1, left_step>(count, packed_left + block * left_block, panel, depth,
                                                     begin > tile.begin ? partial : SumsInMemory{}, last ? done : partial);
          if (last)
            for (int i = 0; i < count; ++i)
              finish_row(tile, row + i, column, columns - column, finished + i * config::micro_columns);
        }
      }
      begin += depth;
    } while (begin < tile.end);
  }

 private:
  static int lesser(int64 x, int64 y) { return int(x < y ? x : y); }

  template <Gathered operand> const Input* row_of(const void* first, int64 stride, int64 sorted_row) const {
    const int64 row = problem::gathered == operand ? outer_source_row(args, sorted_row) : sorted_row;
    return static_cast<const Input*>(first) + row * stride;
  }

  // Columns [column, column + rows) of left, which become rows of d.
  void pack_left(int64 begin, int depth, int64 column, int rows, int height) const {
#pragma unroll 1
    for (int step = 0; step < depth; ++step) {
      const Input* from = row_of<Gathered::left>(args.left, args.left_stride, begin + step) + column;
      float* to = packed_left + step * left_step;
#pragma unroll 1
      for (int row = 0; row < rows; row += height, to += left_block)
#pragma unroll
        for (int i = 0; i < left_step; i += width)
          store(to + i, load_floats<problem::input>(from + row + i, int(problem::p - column) - row - i));
    }
  }

  // A panel of right's columns.
  void pack_right(int64 begin, int depth, int64 column) const {
    Floats* to = panel;
#pragma unroll 1
    for (int step = 0; step < depth; ++step) {
      const Input* from = row_of<Gathered::right>(args.right, args.right_stride, begin + step) + column;
#pragma unroll
      for (int v = 0; v < panel_vectors; ++v)
        *to++ = load_floats<problem::input>(from + v * width, int(problem::q - column) - v * width);
    }
  }

  // Of one row of a panel's sums, the `columns` that exist.
  void finish_row(const OuterTile& tile, int row, int column, int columns, const float* from) const {
    Output* d = static_cast<Output*>(args.d) + tile.expert * args.d_expert_stride + tile.split * args.d_split_stride +
                (tile.row + row) * args.d_stride + tile.column + column;
#pragma unroll
    for (int v = 0; v < panel_vectors; ++v) {
      const int count = columns - v * width;
      if (count <= 0) return;
      Floats value = load<Floats>(from + v * width);
      if constexpr (problem::accumulate) value += load_floats<problem::output>(d + v * width, count);
      store_rounded<problem::output>(d + v * width, value, count);
    }
  }

  const OuterArguments& args;
  float* packed_left;
  Floats* panel;
  float* sums;
};

}  // namespace moe_xe
