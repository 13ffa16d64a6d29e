// A tile of the weights' gradient on the CPU device: a block of sorted rows at a time, left's columns are packed in blocks
// of the micro-kernel's height and right's in panels, whose products are summed. The sums of one element are always added
// in the same order.
#pragma once
#include <moe_xe/cpu/tile_kernel.hpp>
#include <moe_xe/outer_types.hpp>
#include <moe_xe/cpu/team.hpp>

namespace moe_xe {

constexpr int sums_stride = int(round_up(config::tile_columns, config::micro_columns));
// A step of a packed block: micro_rows columns of left, or micro_columns of right, in whole vectors. Blocks are a step more
// apart than they are long: a power of two would map them to the same cache sets.
// For tiles left's columns become rows instead, a vector longer than they are.
constexpr int block_steps = config::row_block / elements_per_step;
constexpr int left_step = int(round_up(config::micro_rows, width)), right_step = config::micro_columns;
constexpr int left_row = block_steps + width;
constexpr int64 left_block = tiled ? config::micro_rows * left_row : (block_steps + 1) * left_step;
constexpr int64 right_block = (block_steps + 1) * right_step;
constexpr int rows_at_once = tiled ? tile_side : 1, steps_at_once = tiled ? tile_k : elements_per_step;

// A work-group's scratch, in dwords.
constexpr int64 left_dwords = round_up((config::tile_rows + config::micro_rows - 1) / config::micro_rows * left_block, 16);
constexpr int64 right_dwords = round_up(sums_stride / config::micro_columns * right_block, 16);
constexpr int64 sums_dwords = round_up(config::tile_rows, rows_at_once) * sums_stride;
static_assert(config::micro_columns % width == 0 && config::row_block % steps_at_once == 0);
static_assert(4 * (left_dwords + right_dwords + sums_dwords) <= config::scratch_bytes, "OuterCpuConfig.scratch_bytes");

class OuterMainloop {
 public:
  OuterMainloop(const OuterArguments& arguments, const Team& team) : args(arguments) {
    auto* scratch = static_cast<float*>(static_cast<void*>(static_cast<char*>(args.scratch) + team.group * config::scratch_bytes));
    packed_left = reinterpret_cast<Packed*>(scratch);
    packed_right = packed_left + left_dwords;
    sums = scratch + left_dwords + right_dwords;
  }

  void run(const OuterTile& tile) {
    if (problem::accumulate && tile.begin == tile.end) return;
    const int rows = lesser(problem::p - tile.row, config::tile_rows);
    const int columns = lesser(problem::q - tile.column, config::tile_columns);
    // Blocks of equal height: 15 rows are 8 + 7, not 14 + 1.
    const int blocks = (rows + config::micro_rows - 1) / config::micro_rows;
    const int height = int(round_up((rows + blocks - 1) / blocks, rows_at_once));
    float finished[config::micro_rows * config::micro_columns];
    int64 begin = tile.begin;
    do {   // once for a tile without sorted rows, too: zeros
      const int depth = lesser(tile.end - begin, config::row_block);
      const int64 end = begin + depth;
      const bool last = end == tile.end;
      if constexpr (tiled) pack_left_as_rows(tile, begin, end, tile.row, rows);
      else pack<Gathered::left, left_step>(tile, begin, end, tile.row, rows, height, packed_left, left_block);
      pack<Gathered::right, right_step>(tile, begin, end, tile.column, columns, right_step, packed_right, right_block);
      const Packed* panel = packed_right;
#pragma unroll 1
      for (int column = 0; column < columns; column += config::micro_columns, panel += right_block) {
#pragma unroll 1
        for (int row = 0, block = 0; row < rows; row += height, ++block) {
          const int count = lesser(rows - row, height);
          const SumsInMemory partial{sums + row * sums_stride + column, sums_stride};
          const SumsInMemory done{finished, config::micro_columns};
          multiply_block(registers, row, block, count, depth, panel, begin > tile.begin ? partial : SumsInMemory{}, last ? done : partial);
          if (last)
            for (int i = 0; i < count; ++i)
              finish_row(tile, row + i, column, columns - column, finished + i * config::micro_columns);
        }
      }
      begin = end;
    } while (begin < tile.end);
  }

 private:
  static int lesser(int64 x, int64 y) { return int(x < y ? x : y); }

  // The sorted rows of a step: one, or a pair, whose second is null past the last one.
  struct Step {
    const Input* first;
    const Input* second;

    // `width` columns from `column` on, of which `count` exist.
    PackedVector load(int64 column, int64 count) const {
      if (tiled && !first) return 0;    // past the last row, up to a whole tile
      const int some = lesser(count, width);
      const Floats loaded = load_floats<problem::input>(first + column, some);
      if constexpr (float_pairs) {
        Floats odd = 0.f;
        if (second) odd = load_floats<problem::input>(second + column, some);
        return __builtin_bit_cast(PackedVector, pairs_of(loaded, odd));
      } else {
        return __builtin_bit_cast(PackedVector, loaded);
      }
    }
  };
  template <Gathered operand> Step step_at(const OuterTile& tile, int64 row, int64 end) const {
    if (tiled && row >= end) return {nullptr, nullptr};
    const bool pair = float_pairs && row + 1 < end;
    return {row_of<operand>(tile, row), pair ? row_of<operand>(tile, row + 1) : nullptr};
  }
  template <Gathered operand> const Input* row_of(const OuterTile& tile, int64 tile_row) const {
    const int64 sorted_row = sorted_row_of(tile, tile_row);
    const int64 row = problem::gathered == operand ? outer_source_row(args, sorted_row) : sorted_row;
    if constexpr (operand == Gathered::left) return static_cast<const Input*>(args.left) + row * args.left_stride;
    else return static_cast<const Input*>(args.right) + row * args.right_stride;
  }

  // `columns` columns of an operand from `column` on, in blocks of `height` of them.
  template <Gathered operand, int step_size>
  void pack(const OuterTile& tile, int64 begin, int64 end, int64 column, int columns, int height, Packed* to, int64 block_size) const {
    constexpr int64 all_columns = operand == Gathered::left ? problem::p : problem::q;
#pragma unroll 1
    for (int64 row = begin; row < begin + round_up(end - begin, steps_at_once); row += elements_per_step, to += step_size) {
      const Step step = step_at<operand>(tile, row, end);
      Packed* block = to;
#pragma unroll 1
      for (int first = 0; first < columns; first += height, block += block_size)
#pragma unroll
        for (int i = 0; i < step_size; i += width)
          store(block + i, step.load(column + first + i, all_columns - column - first - i));
    }
  }

  // `columns` columns of left from `column` on as rows of pairs.
  void pack_left_as_rows(const OuterTile& tile, int64 begin, int64 end, int64 column, int columns) const {
#pragma unroll 1
    for (int64 tile_row = begin; tile_row < end; tile_row += tile_k) {
      Step steps[width];
#pragma unroll 1
      for (int i = 0; i < width; ++i) steps[i] = step_at<Gathered::left>(tile, tile_row + 2 * i, end);
#pragma unroll 1
      for (int first = 0; first < columns; first += width) {
        Dwords pairs[width];
#pragma unroll
        for (int i = 0; i < width; ++i) pairs[i] = __builtin_bit_cast(Dwords, steps[i].load(column + first, problem::p - column - first));
        transpose(pairs);
#pragma unroll
        for (int i = 0; i < width; ++i) store(packed_left + (first + i) * left_row + (tile_row - begin) / 2, pairs[i]);
      }
    }
  }

  // `count` columns of left from `row` on, the block of that number, times a panel of right's, over `depth` sorted rows.
  template <class Tiles>
  void multiply_block(Tiles& tiles, int row, int block, int count, int depth, const Packed* panel, SumsInMemory from, SumsInMemory to) const {
    if constexpr (tiled) {
      const Packed* left = packed_left + row * left_row;
      multiply<true>(tiles, count, {left, left + tile_side * left_row, 4 * left_row, 4 * tile_side},
                     {panel, panel + tile_side, 4 * right_step, 4 * right_step * tile_side}, (depth + tile_k - 1) / tile_k, 0, from, to);
    } else {
      multiply<config::micro_rows, 1, left_step>(count, packed_left + block * left_block, reinterpret_cast<const PackedVector*>(panel),
                                                 (depth + elements_per_step - 1) / elements_per_step, from, to);
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
  [[no_unique_address]] Registers registers;
  Packed* packed_left;
  Packed* packed_right;
  float* sums;
};

}  // namespace moe_xe
