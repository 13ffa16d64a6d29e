// [E, K, N] weights: tokens are the rows of the product and features its 16 columns; the weights' loads interleave pairs
// of K (VNNI).
#pragma once
#include <moe_xe/gpu/epilogue.hpp>
#include <moe_xe/xe/feature_columns.hpp>
#include <moe_xe/xe/part_sums.hpp>
#include <moe_xe/xe/wide.hpp>

namespace moe_xe {

// One sub-group's part of a tile.
template <int variant> class TokensByFeatures {
  using Part = Shape<variant>;
  static constexpr int row_blocks = Part::rows / 8, column_blocks = Part::columns / 16;
  static constexpr int vectors = (Part::rows + 15) / 16;    // of 16 lanes, one for each row
  static constexpr int out_blocks = Part::outputs / 16;
  static constexpr int store_columns = problem::output == Dtype::f32 || out_blocks == 1 ? 16 : 32;

 public:
  [[gnu::always_inline]] TokensByFeatures(const Arguments& args, const Tile& tile, int sub_group, int lane)
      : args(args), tile(tile), lane(lane), first_token(Part::first_row(sub_group)),
        first_feature(Part::first_column(sub_group)), first_output(Part::first_output(tile, sub_group)),
        weights(args, tile, first_feature, lane),
        tokens(token_surface(args, tile), first_step(tile) * x_per_step, int(tile.row) + first_token, 16, Part::rows, 2),
        weight_prefetch(args, tile, sub_group), token_prefetch(args, tile, sub_group, lane) {
    if constexpr (!first_apart)
      for (auto& blocks : sums)
        for (auto& block : blocks) block = zeros();
    if constexpr (problem::gathered)
      unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
        const int64 rows = gathered_token(args, tile, first_token + v * 16 + lane) + first_step(tile) * step_bytes;
        pieces[2 * v] = PieceAddresses::of<0>(rows, lane);
        if constexpr (2 * v + 1 < row_blocks) pieces[2 * v + 1] = PieceAddresses::of<1>(rows, lane);
      });
  }

  template <int ahead, bool first, bool tail> [[gnu::always_inline]] void step() {
    const auto features = weights.template load<ahead>();
    vec<int16, 8> token_values[row_blocks][2];
    if constexpr (!problem::gathered) load_tokens<ahead>(token_values);
    weight_prefetch.template step<ahead>();
    token_prefetch.template step<ahead>();
    unrolled<2>([&](auto half) __attribute__((always_inline)) {
      if constexpr (problem::gathered) gather_tokens<ahead, tail, half>(token_values);
      unrolled<column_blocks>([&](auto j) __attribute__((always_inline)) {
        const vec<int32, 8> columns = weights.template operand<half, j>(features);
        unrolled<row_blocks>([&](auto i) __attribute__((always_inline)) {
          dpas<first && half == 0>(sums[i][j], token_values[i][half], columns);
        });
      });
    });
  }

  template <int steps> [[gnu::always_inline]] void move() {
    weights.template move<steps>();
    if constexpr (problem::gathered)
      for (auto& addresses : pieces) addresses.template move<steps * step_bytes>();
    else tokens.move_x(steps * x_per_step);
    weight_prefetch.template move<steps>();
    token_prefetch.template move<steps>();
  }

  // Where K is split: the sums to memory, and those of all parts from there.
  [[gnu::always_inline]] void save(float* to) const { save_sums(sums, to, lane); }
  [[gnu::always_inline]] void add_up(const float* from) { add_parts(sums, from, lane); }

  [[gnu::always_inline]] void store() {
    finish();
    if constexpr (problem::scattered) return scatter();
    const int output_bytes = size_of(problem::output);
    const Surface surface{args.d, int(out_n) * output_bytes, int(tile.row) + tile.rows, int(args.d_stride) * output_bytes};
    const Block block(surface, first_output, int(tile.row) + first_token, store_columns, 8, 1);
    unrolled<row_blocks>([&](auto i) __attribute__((always_inline)) {
      unrolled<Part::outputs / store_columns>([&](auto j) __attribute__((always_inline)) {
        if constexpr (problem::output == Dtype::f32) block.template store<j * 16, i * 8>(sums[i][j]);
        else block.template store<j * store_columns, i * 8>(rounded<i, j>());
      });
    });
  }

 private:
  template <int ahead> [[gnu::always_inline]] void load_tokens(vec<int16, 8> (&values)[row_blocks][2]) const {
    const auto rows = tokens.template load_rows<Part::rows, ahead * x_per_step, 0>();
    unrolled<row_blocks * 2>([&](auto part) __attribute__((always_inline)) {
      values[part % row_blocks][part / row_blocks] = slice<part, 8>(rows);
    });
  }

  // Gathered tokens come half by half: with their addresses, all of them and the weights would not fit the registers.
  template <int ahead, bool tail, int half>
  [[gnu::always_inline]] void gather_tokens(vec<int16, 8> (&values)[row_blocks][2]) const {
    unrolled<row_blocks>([&](auto i) __attribute__((always_inline)) {
      values[i][half] = gather<ahead * step_bytes + half * 32, tail ? tail_bytes - half * 32 : 32>(pieces[i]);
    });
  }

  // 8 tokens' 32 bytes at an offset, of which `left` are inside the rows. The pieces outside read their row's last
  // piece inside and become zeros: garbage times zero may be NaN.
  template <int offset, int left> [[gnu::always_inline]] vec<int16, 8> gather(PieceAddresses addresses) const {
    if constexpr (left <= 0) return vec<int16, 8>(0);
    else if constexpr (left >= 32) return addresses.template load<offset>();
    constexpr int last_inside = left / 8 - 1;
    const int64 back = lane % 4 > last_inside ? (last_inside - lane % 4) * 8 : 0;
    addresses.move(back);
    const vec<int16, 8> values = addresses.template load<offset>();
    return lane < left / 2 ? values : vec<int16, 8>(0);
  }

  template <int i, int j> [[gnu::always_inline]] vec<int16, store_columns / 2> rounded() const {
    constexpr int blocks = store_columns / 16;
    vec<int16, store_columns / 2> rows;
#pragma unroll
    for (int row = 0; row < 8; ++row)
#pragma unroll
      for (int block = 0; block < blocks; ++block)
        rows[row * blocks + block] = round_to_output(sums[i][j * blocks + block][row]);
    return rows;
  }

  // Sums become outputs, in place: output block j of the rows is column block j.
  [[gnu::always_inline]] void finish() {
    if constexpr (scales_sums) complete_sums(args, tile, sums);
    if constexpr (watches_codes) weights.spoil(sums);
    if constexpr (!problem::has_bias && !paired && problem::act == Act::none && problem::row_scale == RowScale::none) return;
    float scales[vectors];
    for (int v = 0; v < vectors; ++v) {
      const int row = first_token + v * 16 + lane;
      scales[v] = scale_of(args, tile.row + (row < tile.rows ? row : tile.rows - 1));
    }
    unrolled<column_blocks>([&](auto c) __attribute__((always_inline)) {
      float bias = 0.0f;
      if constexpr (woven && problem::has_bias) bias = bias_at(args, tile.expert, first_output + c * 8 + lane / 2, lane % 2);
      else if constexpr (problem::has_bias) bias = bias_at(args, tile.expert, first_output + c % out_blocks * 16 + lane, c / out_blocks);
      unrolled<row_blocks>([&](auto i) __attribute__((always_inline)) {
        if constexpr (problem::row_scale == RowScale::sums) scale_rows<i>(sums[i][c], scales);
        if constexpr (problem::has_bias) sums[i][c] = (Wide{sums[i][c]} + OfLanes(bias)).values;
      });
    });
    unrolled<out_blocks>([&](auto j) __attribute__((always_inline)) {
      unrolled<row_blocks>([&](auto i) __attribute__((always_inline)) {
        Wide gates{sums[i][j]}, ups{sums[i][paired && !woven ? j + out_blocks : j]};
        if constexpr (woven) unweave(sums[i][2 * j], sums[i][2 * j + 1], gates.values, ups.values);
        sums[i][j] = output_of<WideMath>(gates, ups).values;
        if constexpr (problem::row_scale == RowScale::outputs) scale_rows<i>(sums[i][j], scales);
      });
    });
  }

  // Row block i of a column block, each row times its factor.
  template <int i> [[gnu::always_inline]] void scale_rows(vec<float, 8>& rows, const float (&scales)[vectors]) const {
    unrolled<8>([&](auto r) __attribute__((always_inline)) {
      rows[int(r)] *= __spirv_GroupBroadcast(__spv::Scope::Subgroup, scales[i / 2], unsigned(i % 2 * 8 + r));
    });
  }

  // One row at a time to its own place. The surface has neither the rows of wrong indices nor columns beyond N.
  [[gnu::always_inline]] void scatter() const {
    const int output_bytes = size_of(problem::output);
    const Surface surface{args.d, int(out_n) * output_bytes, int(args.d_rows), int(args.d_stride) * output_bytes};
    const Block block(surface, first_output, 0, store_columns, 1, 1);
    unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
      const int row = first_token + v * 16 + lane;
      const int targets = row < tile.rows ? args.row_indices[tile.row + row] : -1;
      unrolled<(Part::rows < 16 ? 8 : 16)>([&](auto l) __attribute__((always_inline)) {
        constexpr int i = 2 * v + l / 8, r = l % 8;
        block.set_y(__spirv_GroupBroadcast(__spv::Scope::Subgroup, targets, unsigned(l)));
        unrolled<Part::outputs / store_columns>([&](auto j) __attribute__((always_inline)) {
          if constexpr (problem::output == Dtype::f32) {
            block.template store_row<j * 16, 0>(sums[i][j][r]);
          } else {
            constexpr int blocks = store_columns / 16;
            vec<int16, blocks> values;
#pragma unroll
            for (int b = 0; b < blocks; ++b) values[b] = round_to_output(sums[i][j * blocks + b][r]);
            block.template store_row<j * store_columns, 0>(values);
          }
        });
      });
    });
  }

  const Arguments& args;
  const Tile& tile;
  int lane, first_token, first_feature, first_output;
  FeatureColumns<variant> weights;
  Block tokens;
  WeightPrefetch<variant> weight_prefetch;
  TokenPrefetchOf<variant> token_prefetch;
  PieceAddresses pieces[row_blocks];
  vec<float, 8> sums[row_blocks][column_blocks];
};

}  // namespace moe_xe
