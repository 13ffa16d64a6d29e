// A tile on the CPU device: A's rows are packed once for all tiles that share them; then, K block by K block, each
// panel of weights is packed and multiplied with all rows. Sums of one element are always added in the same order, so
// results do not depend on which work-group computes a tile.
#pragma once
#include <moe_xe/micro_kernel_cpu.hpp>
#include <moe_xe/team_cpu.hpp>

namespace moe_xe {

constexpr int tallest = config::heights[0];
constexpr int64 k_block = config::k_block < padded_k ? config::k_block : padded_k;
constexpr int64 k_blocks = (problem::k + k_block - 1) / k_block;
constexpr int sums_stride = int(round_up(config::tile_width, config::micro_columns));
static_assert(k_block % chunk == 0 && config::micro_columns % width == 0);

// A work-group's scratch, in dwords.
constexpr int64 packed_a_dwords = round_up(tallest * packed_stride, 16);
constexpr int64 panel_dwords = round_up(k_block / elements_per_step * config::micro_columns, 16);
constexpr int64 sums_dwords = k_blocks > 1 ? round_up(tallest * sums_stride, 16) : 0;
static_assert(4 * (packed_a_dwords + panel_dwords + sums_dwords) <= config::scratch_bytes, "CpuConfig.scratch_bytes");

class Mainloop {
 public:
  Mainloop(const Arguments& arguments, const Team& team) : args(arguments) {
    auto* scratch = static_cast<float*>(static_cast<void*>(static_cast<char*>(args.scratch) + team.group * config::scratch_bytes));
    packed_a = reinterpret_cast<Packed*>(scratch);
    panel = reinterpret_cast<PackedVector*>(scratch + packed_a_dwords);
    sums = scratch + packed_a_dwords + panel_dwords;
  }

  void run(const Tile& tile) {
    const int left = int(problem::n - tile.column);
    const int columns = left < config::tile_width ? left : config::tile_width;
    if (tile.rows > config::unpacked_rows) run_packed(tile, columns);
    else if constexpr (problem::weights == WeightLayout::enk) run_dot_products(tile, columns);
    else run_streamed(tile, columns);
  }

 private:
  const Input* row_of_a(int64 row) const {
    if constexpr (problem::gathered) {
      const int64 index = args.gather_indices[row];
      row = index < 0 ? 0 : index < args.a_rows ? index : args.a_rows - 1;
    }
    return static_cast<const Input*>(args.a) + row * args.a_stride;
  }
  const Input* weights_of(int expert) const { return static_cast<const Input*>(args.w) + expert * args.w_expert_stride; }
  Output* row_of_d(int64 row) const { return static_cast<Output*>(args.d) + row * args.d_stride; }
  const auto* bias_of(int expert) const {
    return static_cast<const Element<problem::bias>*>(args.bias) + expert * args.bias_stride;
  }

  void run_packed(const Tile& tile, int columns) {
    if (packed_row != tile.row) {
      for (int row = 0; row < tile.rows; ++row) pack_row(row_of_a(tile.row + row), packed_a + row * packed_stride);
      packed_row = tile.row;
    }
    // Blocks of equal height: 7 rows are 4 + 3, not 6 + 1.
    const int blocks = (tile.rows + config::micro_rows - 1) / config::micro_rows;
    const int height = (tile.rows + blocks - 1) / blocks;
    float finished[config::micro_rows * config::micro_columns];
#pragma unroll 1
    for (int64 k = 0; k < problem::k; k += k_block) {
      const int depth = int(problem::k - k < k_block ? problem::k - k : k_block);
#pragma unroll 1
      for (int column = 0; column < columns; column += config::micro_columns) {
        pack_panel(tile, k, depth, column, columns - column);
#pragma unroll 1
        for (int row = 0; row < tile.rows; row += height) {
          const int rows = tile.rows - row < height ? tile.rows - row : height;
          const SumsInMemory partial{sums + row * sums_stride + column, sums_stride};
          const SumsInMemory done{finished, config::micro_columns};
          const bool last = k + depth == problem::k;
          multiply<config::micro_rows>(rows, packed_a + row * packed_stride + k / elements_per_step, panel,
                                       (depth + elements_per_step - 1) / elements_per_step,
                                       k > 0 ? partial : SumsInMemory{}, last ? done : partial);
          if (last)
            for (int i = 0; i < rows; ++i)
#pragma unroll
              for (int v = 0; v < panel_vectors; ++v)
                finish(tile, row + i, column + v * width, columns, load<Floats>(finished + i * config::micro_columns + v * width));
        }
      }
    }
  }

  // Bias, then one rounding. The column is relative to the tile's, of which `columns` exist.
  void finish(const Tile& tile, int row, int column, int columns, Floats value) const {
    const int count = columns - column;
    if (count <= 0) return;
    const int64 n = tile.column + column;
    if constexpr (problem::has_bias) value += load_floats<problem::bias>(bias_of(tile.expert) + n, count);
    store_rounded<problem::output>(row_of_d(tile.row + row) + n, value, count);
  }

  void pack_panel(const Tile& tile, int64 k, int depth, int column, int columns) {
    const Input* w = weights_of(tile.expert);
    const int64 n = tile.column + column;
    if constexpr (problem::weights == WeightLayout::enk) pack_panel_enk(w + n * args.w_stride + k, args.w_stride, columns, depth, panel);
    else pack_panel_ekn(w + k * args.w_stride + n, args.w_stride, columns, depth, panel);
  }

  // A few rows and [K, N] weights: the weights stream by once, some rows of K at a time, and are added to sums that stay
  // in the first cache.
  void run_streamed(const Tile& tile, int columns) {
    constexpr int depth = 4, ahead = 2 * depth;
    float streamed[config::unpacked_rows][sums_stride] = {};
    const Input* w = weights_of(tile.expert) + tile.column;
#pragma unroll 1
    for (int64 k = 0; k < problem::k; k += depth) {
      float tokens[config::unpacked_rows][depth];
      for (int row = 0; row < tile.rows; ++row)
#pragma unroll
        for (int i = 0; i < depth; ++i)
          tokens[row][i] = k + i < problem::k ? widened<problem::input>(row_of_a(tile.row + row)[k + i]) : 0.f;
#pragma unroll 1
      for (int column = 0; column < columns; column += width) {
        Floats weights[depth];
#pragma unroll
        for (int i = 0; i < depth; ++i) {
          const Input* from = w + (k + i < problem::k ? k + i : k) * args.w_stride + column;
          prefetch(from + ahead * args.w_stride);
          weights[i] = load_floats<problem::input>(from, columns - column);
        }
#pragma unroll 1
        for (int row = 0; row < tile.rows; ++row) {
          Floats sum = load<Floats>(streamed[row] + column);
#pragma unroll
          for (int i = 0; i < depth; ++i)
            if (k + i < problem::k) sum = tokens[row][i] * weights[i] + sum;
          store(streamed[row] + column, sum);
        }
      }
    }
    for (int row = 0; row < tile.rows; ++row)
      for (int column = 0; column < columns; column += width)
        finish(tile, row, column, columns, load<Floats>(streamed[row] + column));
  }

  void run_dot_products(const Tile& tile, int columns) {
#pragma unroll 1
    for (int row = 0; row < tile.rows; row += config::dot_rows)
      run_dots<config::dot_rows>(tile, row, tile.rows - row, columns);
  }

  template <int rows> void run_dots(const Tile& tile, int row, int wanted, int columns) {
    if constexpr (rows > 1)
      if (wanted < rows) return run_dots<rows - 1>(tile, row, wanted, columns);
    // One row is bound by memory: more columns, more streams. With more rows the registers are the limit.
    constexpr int step = rows == 1 ? width : width / 2;
    const Input* a[rows];
#pragma unroll
    for (int i = 0; i < rows; ++i) a[i] = row_of_a(tile.row + row + i);
#pragma unroll 1
    for (int column = 0; column < columns; column += step) {
      const int count = columns - column < step ? columns - column : step;
      const int64 n = tile.column + column;
      const Input* w[step];
#pragma unroll
      for (int i = 0; i < step; ++i) w[i] = weights_of(tile.expert) + (n + (i < count ? i : count - 1)) * args.w_stride;
      Floats result[rows];
      dot<rows, step>(a, w, config::prefetch_columns * args.w_stride, result);
#pragma unroll
      for (int i = 0; i < rows; ++i) finish(tile, row + i, column, column + count, result[i]);
    }
  }

  const Arguments& args;
  Packed* packed_a;
  PackedVector* panel;
  float* sums;
  int64 packed_row = -1;   // first row of the tile whose rows packed_a holds
};

}  // namespace moe_xe
