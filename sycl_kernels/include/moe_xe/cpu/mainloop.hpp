// A tile on the CPU device: A's rows are packed once for all tiles that share them; then, K block by K block, each
// panel of weights is packed and multiplied with all rows. Sums of one element are always added in the same order, so
// results do not depend on which work-group computes a tile.
#pragma once
#include <moe_xe/cpu/few_rows.hpp>
#include <moe_xe/cpu/team.hpp>
#include <moe_xe/cpu/tile_pack.hpp>

namespace moe_xe {

constexpr int tallest = config::heights[0];
constexpr int64 k_blocks = (problem::k + k_block - 1) / k_block;
constexpr int sums_stride = int(round_up(config::tile_width, config::micro_columns));
static_assert(k_block % chunk == 0 && config::micro_columns % width == 0);

// A work-group's scratch, in dwords.
constexpr int rows_at_once = tiled ? tile_side : 1;
constexpr int few_rows = tallest < config::unpacked_rows ? tallest : config::unpacked_rows;
constexpr int64 most_rows = round_up(tallest, rows_at_once);
constexpr int64 rows_dwords = most_rows * packed_stride, tokens_dwords = few_rows * token_stride;
constexpr int64 packed_a_dwords = round_up(rows_dwords > tokens_dwords ? rows_dwords : tokens_dwords, 16);
constexpr int64 panel_dwords = round_up((k_block / elements_per_step + (tiled ? 16 : 0)) * config::micro_columns, 16);
constexpr int64 sums_dwords = k_blocks > 1 ? round_up(most_rows * sums_stride, 16) : 0;
static_assert(4 * (packed_a_dwords + panel_dwords + sums_dwords) <= config::scratch_bytes, "CpuConfig.scratch_bytes");

// Few rows multiply floats, or pairs of bf16; rows of int8 and pairs of fp16 are always packed.
constexpr bool can_read_in_place = !int8_steps && !f16_pairs && (!quantised || !rows_are_n || lanes_have_a_group);
constexpr bool reads_all_in_place = can_read_in_place && tallest <= config::unpacked_rows;

class Mainloop {
 public:
  Mainloop(const Arguments& arguments, const Team& team) : args(arguments), team(team) {
    auto* scratch = static_cast<float*>(static_cast<void*>(static_cast<char*>(args.scratch) + team.group * config::scratch_bytes));
    packed_a = reinterpret_cast<Packed*>(scratch);
    panel = reinterpret_cast<PackedVector*>(scratch + packed_a_dwords);
    sums = scratch + packed_a_dwords + panel_dwords;
  }

  void run(const Tile& tile) {
    const int64 column = paired ? tile.column / 2 : tile.column;
    const int left = int(out_n - column), most = paired ? config::tile_width / 2 : config::tile_width;
    const int columns = left < most ? left : most;
    compute(tile, column, columns);
    if constexpr (split)
      if (team.is_last(parts_of(args, team.num_groups, tile).done, config::splits)) add_parts(tile, column, columns);
  }

 private:
  const Input* row_of_a(int64 row) const { return static_cast<const Input*>(args.a) + source_row(args, row) * args.a_stride; }

  // Where the sums of one of the tile's rows go.
  OutputRow output(const Tile& tile, int row, int64 first_column) const {
    OutputRow output = output_row(args, tile.row + row);
    if constexpr (split) output.sums = parts_of(args, team.num_groups, tile).of(tile.part) + row * part_stride - first_column;
    return output;
  }

  void add_parts(const Tile& tile, int64 first_column, int columns) const {
    const float* first = parts_of(args, team.num_groups, tile).of(0);
#pragma unroll 1
    for (int row = 0; row < tile.rows; ++row, first += part_stride) {
      const OutputRow output = output_row(args, tile.row + row);
#pragma unroll 1
      for (int column = 0; column < columns; column += width) {
        const Floats gate = sum_of_parts(first + column), up = paired ? sum_of_parts(first + part_stride / 2 + column) : gate;
        write_outputs(args, tile.expert, output, first_column + column, columns - column, gate, up);
      }
    }
  }

  void compute(const Tile& tile, int64 column, int columns) {
    if constexpr (can_read_in_place)
      if (reads_all_in_place || tile.rows <= config::unpacked_rows) return run_few(tile, column, columns);
    if constexpr (!reads_all_in_place) run_packed(tile, column, columns);
  }

  // Once for all tiles of the same rows. They are the same tiles: one kind of packing does for all.
  template <class Pack> void pack_rows(const Tile& tile, int64 stride, Pack pack) {
    if (packed_row == tile.row) return;
    for (int row = 0; row < tile.rows; ++row) pack(row_of_a(tile.row + row), packed_a + row * stride);
    packed_row = tile.row;
  }

  // So many at a time, as columns; rows past the last one repeat it.
  template <int side> void pack_rows_as_columns(const Tile& tile) {
    if (packed_row == tile.row) return;
#pragma unroll 1
    for (int row = 0; row < tile.rows; row += side) {
      const Input* from[side];
      for (int i = 0; i < side; ++i) from[i] = row_of_a(tile.row + (row + i < tile.rows ? row + i : tile.rows - 1));
      pack_columns(from, packed_a + row * packed_stride);
    }
    packed_row = tile.row;
  }

  // A panel of weights: packed, or where it lies.
  auto panel_of(const Weights& w, int64 output, int columns, int64 first, int depth) const {
    if constexpr (tiled) return panel_tiles(w, output, columns, first, depth, panel);
    else {
      if constexpr (problem::weights == WeightLayout::enk) pack_panel_enk(w, output, columns, first, depth, panel);
      else pack_panel_ekn(w, output, columns, first, depth, panel);
      return panel;
    }
  }

  // `rows` packed rows from `row` on times a panel, over `depth` elements of K from k on.
  template <class Panel>
  void multiply_block(int row, int rows, const Panel& weights, int64 k, int depth, SumsInMemory from, SumsInMemory to) {
    const Packed* a = packed_a + row * packed_stride;
    if constexpr (tiled)
      multiply<!tokens_are_columns>(registers, rows, packed_rows(a, k), weights.tiles, (depth + tile_k - 1) / tile_k,
                                    row == 0 ? weights.ahead : 0, from, to);
    else
      multiply<config::micro_rows, packed_stride, 1>(rows, a + k / elements_per_step, weights,
                                                     (depth + elements_per_step - 1) / elements_per_step, from, to);
  }

  void run_packed(const Tile& tile, int64 first_column, int columns) {
    if constexpr (tokens_are_columns) pack_rows_as_columns<tile_side>(tile);
    else pack_rows(tile, packed_stride, [](const Input* from, Packed* to) { pack_row(from, to); });
    // Blocks of equal height: 7 rows are 4 + 3, not 6 + 1.
    const int blocks = (tile.rows + config::micro_rows - 1) / config::micro_rows;
    const int height = int(round_up((tile.rows + blocks - 1) / blocks, rows_at_once));
    constexpr int panel_columns = paired ? config::micro_columns / 2 : config::micro_columns;
    float finished[config::micro_rows * config::micro_columns], scales[config::micro_columns];
    const Weights w(args, tile.expert);
    const KRange part = part_of(tile, chunk);
#pragma unroll 1
    for (int64 k = part.begin; k < part.end; k += k_block) {
      const int64 left = part.end - k;
      const int depth = int(left < k_block ? left : k_block);
#pragma unroll 1
      for (int column = 0; column < columns; column += panel_columns) {
        const auto weights = panel_of(w, first_column + column, columns - column, k, depth);
        if constexpr (int8_steps)
          if (depth == left) load_scales(w, first_column + column, columns - column, scales);
        const int first_sum = column / panel_columns * config::micro_columns;
#pragma unroll 1
        for (int row = 0; row < tile.rows; row += height) {
          const int rows = tile.rows - row < height ? tile.rows - row : height;
          const SumsInMemory partial{sums + row * sums_stride + first_sum, sums_stride};
          const SumsInMemory done{finished, config::micro_columns};
          const bool last = depth == left;
          multiply_block(row, rows, weights, k, depth, k > part.begin ? partial : SumsInMemory{}, last ? done : partial);
          if (last)
            for (int i = 0; i < rows; ++i)
              finish_panel(tile.expert, output(tile, row + i, first_column), first_column + column, columns - column,
                           finished + i * config::micro_columns, scales, packed_a + (row + i) * packed_stride);
        }
      }
    }
  }

  // The scales of a panel's columns, which exist to `columns`.
  template <class SomeWeights> static void load_scales(const SomeWeights& w, int64 column, int columns, float* scales) {
#pragma unroll 1
    for (int v = 0; v < panel_vectors; ++v) {
      Weights::Column at[width];
      columns_of(w, column, columns, v, at);
#pragma unroll
      for (int i = 0; i < width; ++i) scales[v * width + i] = w.scale(at[i]);
    }
  }

  // A vector of a panel's sums. packed: the row's codes, if these are summed.
  static Floats sums_at(const float* from, int place, const float* scales, const Packed* packed) {
    if constexpr (!int8_steps) return load<Floats>(from + place);
    else {
      const Sums excess = int8_shifted ? int(packed[packed_k]) : 0;
      return __builtin_convertvector(load<Sums>(from + place) - excess, Floats) * load<Floats>(scales + place);
    }
  }

  // One row of a panel's sums; `columns` of its output columns exist.
  void finish_panel(int expert, const OutputRow& row, int64 column, int columns, const float* from, const float* scales,
                    const Packed* packed) const {
    constexpr int outputs = paired ? panel_vectors / 2 : panel_vectors;   // vectors
#pragma unroll
    for (int v = 0; v < outputs; ++v) {
      Floats gate = sums_at(from, (woven ? 2 * v : v) * width, scales, packed), up = gate;
      if constexpr (paired) up = sums_at(from, (woven ? 2 * v + 1 : v + gate_vectors) * width, scales, packed);
      if constexpr (woven) unweave(gate, up, gate, up);
      finish(args, expert, row, column + v * width, columns - v * width, gate, up);
    }
  }

  void run_few(const Tile& tile, int64 column, int columns) {
    FewRows few;
    few.count = tile.rows;
    few.part = part_of(tile, rows_are_n ? span : chunk);
    for (int row = 0; row < tile.rows; ++row) {
      few.a[row] = row_of_a(tile.row + row);
      few.tokens[row] = packed_a + row * token_stride;
      few.d[row] = output(tile, row, column);
    }
    if constexpr (rows_are_n) pack_rows(tile, token_stride, [](const Input* from, Packed* to) { spread_tokens(from, to); });
    const Weights w(args, tile.expert);
    if constexpr (problem::weights == WeightLayout::ekn) run_streamed(args, tile.expert, few, w, column, columns);
    else
#pragma unroll 1
      for (int row = 0; row < tile.rows; row += config::dot_rows)
        run_dots(tile.rows - row < config::dot_rows ? tile.rows - row : config::dot_rows, args, tile.expert, few, row, w, column, columns);
  }

  const Arguments& args;
  const Team& team;
  [[no_unique_address]] Registers registers;
  Packed* packed_a;
  PackedVector* panel;
  float* sums;
  int64 packed_row = -1;   // first row of the tile whose rows packed_a holds
};

}  // namespace moe_xe
