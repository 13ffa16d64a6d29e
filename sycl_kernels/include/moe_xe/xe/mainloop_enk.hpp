// [E, N, K] weights: features are the rows of the product and tokens its 16 columns, one a lane. Weights then load as
// they lie, gathered tokens are per-lane loads that already have operand B's layout, and a token's outputs are
// consecutive in its lane's registers.
#pragma once
#include <moe_xe/gpu/epilogue.hpp>
#include <moe_xe/xe/feature_rows.hpp>
#include <moe_xe/xe/part_sums.hpp>
#include <moe_xe/xe/wide.hpp>

namespace moe_xe {

// One sub-group's part of a tile.
template <int variant> class FeaturesByTokens {
  using Part = Shape<variant>;
  static constexpr int feature_blocks = Part::columns / 8, token_blocks = Part::rows / 16;
  static constexpr bool whole_pieces = out_n % Part::outputs == 0;   // N cuts no sub-group's outputs

 public:
  [[gnu::always_inline]] FeaturesByTokens(const Arguments& args, const Tile& tile, int sub_group, int lane)
      : args(args), tile(tile), lane(lane), first_token(Part::first_row(sub_group)),
        first_feature(Part::first_column(sub_group)), first_output(Part::first_output(tile, sub_group)),
        weights(args, tile, first_feature, lane),
        tokens(token_surface(args, tile), first_step(tile) * x_per_step / 2, int(tile.row) + first_token, 8, 16, 1),
        weight_prefetch(args, tile, sub_group), token_prefetch(args, tile, sub_group, lane) {
    if constexpr (!first_apart)
      for (auto& blocks : sums)
        for (auto& block : blocks) block = zeros();
    if constexpr (problem::gathered)
      for (int j = 0; j < token_blocks; ++j)
        token[j] = gathered_token(args, tile, first_token + j * 16 + lane) + first_step(tile) * step_bytes;
  }

  template <int ahead, bool first, bool tail> [[gnu::always_inline]] void step() {
    if constexpr (quantised) step_of_codes<ahead, tail>();
    else step_of_weights<ahead, first, tail>();
  }

  template <int steps> [[gnu::always_inline]] void move() {
    weights.template move<steps>();
    if constexpr (problem::gathered)
      for (auto& address : token) address += steps * step_bytes;
    else tokens.move_x(steps * x_per_step / 2);
    weight_prefetch.template move<steps>();
    token_prefetch.template move<steps>();
  }

  // Where K is split: the sums to memory, and those of all parts from there.
  [[gnu::always_inline]] void save(float* to) const { save_sums(sums, to, lane); }
  [[gnu::always_inline]] void add_up(const float* from) { add_parts(sums, from, lane); }

  [[gnu::always_inline]] void store() {
    constexpr int piece = Part::outputs < 16 || problem::output == Dtype::f32 ? 8 : 16;  // features a message
    finish();
    unrolled<token_blocks>([&](auto j) __attribute__((always_inline)) {
      const int row = j * 16 + lane;
      if (first_token + row >= tile.rows) return;
      char* target = target_of(row);
      if (problem::scattered && !target) return;
      unrolled<Part::outputs / piece>([&](auto i) __attribute__((always_inline)) {
        store_piece<piece, i * piece, j>(target, first_output + i * piece);
      });
    });
  }

 private:
  // 32 bytes of each lane's token.
  template <int ahead, bool tail, int half, int j> [[gnu::always_inline]] vec<int32, 8> load_tokens() const {
    if constexpr (!problem::gathered) {
      return tokens.template load_transposed<ahead * x_per_step / 2 + half * 8, j * 16>();
    } else {
      constexpr int left = tail ? tail_bytes - half * 32 : 32, offset = ahead * step_bytes + half * 32;
      if constexpr (left >= 32) return load_lanes<offset>(token[j]);
      else if constexpr (left > 0) return __builtin_shufflevector(load_half_lanes<offset>(token[j]), vec<int32, 4>(0), 0, 1, 2, 3, 4, 5, 6, 7);
      else return vec<int32, 8>(0);
    }
  }

  template <int ahead, bool first, bool tail> [[gnu::always_inline]] void step_of_weights() {
    const auto features = weights.template load<ahead>();
    vec<int32, 8> token_values[2][token_blocks];
    unrolled<2>([&](auto half) __attribute__((always_inline)) {
      unrolled<token_blocks>([&](auto j) __attribute__((always_inline)) {
        token_values[half][j] = load_tokens<ahead, tail, half, j>();
      });
    });
    weight_prefetch.template step<ahead>();
    token_prefetch.template step<ahead>();
    unrolled<2>([&](auto half) __attribute__((always_inline)) {
      unrolled<token_blocks>([&](auto j) __attribute__((always_inline)) {
        unrolled<feature_blocks>([&](auto i) __attribute__((always_inline)) {
          dpas<first && half == 0>(sums[i][j], weights.template operand<half, i>(features), token_values[half][j]);
        });
      });
    });
  }

  // An operand of codes is made once for all tokens, and those come half by half: codes and factors take registers, too.
  template <int ahead, bool tail> [[gnu::always_inline]] void step_of_codes() {
    weights.template load<ahead>();
    weight_prefetch.template step<ahead>();
    token_prefetch.template step<ahead>();
    unrolled<2>([&](auto half) __attribute__((always_inline)) {
      vec<int32, 8> token_values[token_blocks];
      unrolled<token_blocks>([&](auto j) __attribute__((always_inline)) { token_values[j] = load_tokens<ahead, tail, half, j>(); });
      weights.template begin<ahead, half>();
      unrolled<feature_blocks>([&](auto i) __attribute__((always_inline)) {
        const vec<int32, 4> features = weights.template operand<ahead, half, i>();
        unrolled<token_blocks>([&](auto j) __attribute__((always_inline)) { dpas(sums[i][j], features, token_values[j]); });
      });
    });
  }

  // The row of d of one of the sub-group's rows, or null. A row has fewer than 2^24 bytes.
  [[gnu::always_inline]] char* target_of(int row) const {
    char* d = static_cast<char*>(args.d);
    const unsigned row_bytes = unsigned(args.d_stride) * size_of(problem::output);
    const int64 sorted_row = tile.row + first_token;
    if constexpr (!problem::scattered) return d + sorted_row * int64(row_bytes) + unsigned(row) * row_bytes;
    const int64 target = target_row(args, sorted_row + row);
    return target < 0 ? nullptr : d + int64(unsigned(target)) * row_bytes;
  }

  // Sums become outputs, in place: output f of a token is at feature f.
  [[gnu::always_inline]] void finish() {
    if constexpr (scales_sums) complete_sums(args, tile, sums);
    if constexpr (watches_codes) weights.spoil(sums);
    if constexpr (!problem::has_bias && !paired && problem::act == Act::none && problem::row_scale == RowScale::none) return;
    float scales[token_blocks];
    unrolled<token_blocks>([&](auto j) __attribute__((always_inline)) {
      const int row = first_token + j * 16 + lane;
      scales[j] = scale_of(args, tile.row + (row < tile.rows ? row : tile.rows - 1));
    });
    constexpr int lanes = Part::outputs < 16 ? Part::outputs : 16;
    unrolled<Part::outputs / lanes>([&](auto i) __attribute__((always_inline)) {
      float bias = 0.0f, up_bias = 0.0f;    // of the lane's output
      if constexpr (problem::has_bias) {
        const int column = first_output + i * lanes + lane % lanes;
        bias = bias_at(args, tile.expert, column, 0);
        if constexpr (paired) up_bias = bias_at(args, tile.expert, column, 1);
      }
      unrolled<lanes / 8>([&](auto eight) __attribute__((always_inline)) {
        constexpr int block = i * (lanes / 8) + eight;
        for (int j = 0; j < token_blocks; ++j) {
          Wide gates, ups;
          unrolled<8>([&](auto r) __attribute__((always_inline)) {
            constexpr int f = block * 8 + r;
            constexpr int gate = problem::pairs == Pairs::interleaved ? 2 * f : f;
            constexpr int up = problem::pairs == Pairs::interleaved ? 2 * f + 1 : paired ? f + Part::outputs : f;
            float gate_bias = 0.0f;
            if constexpr (problem::has_bias) gate_bias = __spirv_GroupBroadcast(__spv::Scope::Subgroup, bias, unsigned(eight * 8 + r));
            gates.values[int(r)] = input_of(sums[gate / 8][j][gate % 8], gate_bias, scales[j]);
            if constexpr (paired) {
              float up_bias_of_f = 0.0f;
              if constexpr (problem::has_bias) up_bias_of_f = __spirv_GroupBroadcast(__spv::Scope::Subgroup, up_bias, unsigned(eight * 8 + r));
              ups.values[int(r)] = input_of(sums[up / 8][j][up % 8], up_bias_of_f, scales[j]);
            }
          });
          Wide outputs = output_of<WideMath>(gates, ups);
          if constexpr (problem::row_scale == RowScale::outputs) outputs = outputs * OfLanes(scales[j]);
          sums[block][j] = outputs.values;
        }
      });
    });
  }

  // `count` consecutive features of one token block; a last piece that N cuts goes element by element.
  template <int count, int feature, int j> [[gnu::always_inline]] void store_piece(char* row, int column) const {
    using Element = std::conditional_t<problem::output == Dtype::f32, float, int16>;
    using Piece = vec<Element, count> __attribute__((aligned(16)));
    Element* d = reinterpret_cast<Element*>(row) + column;
    vec<Element, count> values;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float sum = sums[(feature + i) / 8][j][i % 8];
      if constexpr (problem::output == Dtype::f32) values[i] = sum;
      else values[i] = round_to_output(sum);
    }
    if (whole_pieces || column + count <= out_n) {
      *reinterpret_cast<Piece*>(d) = values;
    } else if constexpr (out_n % count != 0) {
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (column + i < out_n) d[i] = values[i];
    }
  }

  const Arguments& args;
  const Tile& tile;
  int lane, first_token, first_feature, first_output;
  FeatureRows<variant> weights;
  Block tokens;
  WeightPrefetch<variant> weight_prefetch;
  TokenPrefetchOf<variant> token_prefetch;
  int64 token[token_blocks];
  vec<float, 8> sums[feature_blocks][token_blocks];
};

}  // namespace moe_xe
