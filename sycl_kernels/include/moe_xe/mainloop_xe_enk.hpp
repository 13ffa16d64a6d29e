// [E, N, K] weights: features are the rows of the product and tokens its 16 columns, one a lane. Weights then load as
// they lie, gathered tokens are per-lane loads that already have operand B's layout, and a token's outputs are
// consecutive in its lane's registers.
#pragma once
#include <moe_xe/epilogue.hpp>
#include <moe_xe/k_loop_xe.hpp>

namespace moe_xe {

// One sub-group's part of a tile.
template <int variant> class FeaturesByTokens {
  using Part = Shape<variant>;
  static constexpr int feature_blocks = Part::columns / 8, token_blocks = Part::rows / 16;
  static constexpr int load_rows = Part::columns < 32 ? Part::columns : 32;  // a block message has 32 rows at most

 public:
  [[gnu::always_inline]] FeaturesByTokens(const Arguments& args, const Tile& tile, int sub_group, int lane)
      : args(args), tile(tile), lane(lane), first_token(Part::first_row(sub_group)),
        first_feature(tile.column + Part::first_column(sub_group)),
        weights(weight_surface(args, tile), 0, first_feature, 16, load_rows, 2),
        tokens(token_surface(args, tile), 0, int(tile.row) + first_token, 8, 16, 1),
        weight_prefetch(args, tile, sub_group), token_prefetch(args, tile, sub_group, lane) {
    for (auto& blocks : sums)
      for (auto& block : blocks) block = 0.0f;
    if constexpr (problem::gathered)
      for (int j = 0; j < token_blocks; ++j) token[j] = gathered_token(args, tile, first_token + j * 16 + lane);
  }

  template <int ahead, bool tail> [[gnu::always_inline]] void step() {
    vec<int16, 2 * load_rows> features[Part::columns / load_rows];
    unrolled<Part::columns / load_rows>([&](auto i) __attribute__((always_inline)) {
      features[i] = weights.template load_rows<load_rows, ahead * x_per_step, i * 32>();
    });
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
          constexpr int blocks = load_rows / 8;
          dpas(sums[i][j], slice<half * blocks + i % blocks, 8>(features[i / blocks]), token_values[half][j]);
        });
      });
    });
  }

  [[gnu::always_inline]] void end_round() {
    weights.move_x(unroll * x_per_step);
    if constexpr (problem::gathered)
      for (auto& address : token) address += unroll * step_bytes;
    else tokens.move_x(unroll * x_per_step / 2);
    weight_prefetch.end_round();
    token_prefetch.end_round();
  }

  [[gnu::always_inline]] void store() {
    if constexpr (problem::has_bias) add_bias();
    constexpr int piece = Part::columns < 16 || problem::output == Dtype::f32 ? 8 : 16;  // features a message
    unrolled<token_blocks>([&](auto j) __attribute__((always_inline)) {
      const int row = first_token + j * 16 + lane;
      if (row >= tile.rows) return;
      const int64 element = (tile.row + row) * args.d_stride + first_feature;
      unrolled<Part::columns / piece>([&](auto i) __attribute__((always_inline)) {
        store_piece<piece, i * piece, j>(element + i * piece);
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
      else if constexpr (left > 0) return load_half_lanes<offset>(token[j]);
      else return vec<int32, 8>(0);
    }
  }

  [[gnu::always_inline]] void add_bias() {
    constexpr int lanes = Part::columns < 16 ? Part::columns : 16;
    unrolled<Part::columns / lanes>([&](auto i) __attribute__((always_inline)) {
      const float bias = bias_of(args, tile.expert, first_feature + i * lanes + lane % lanes);
      unrolled<lanes>([&](auto feature) __attribute__((always_inline)) {
        const float value = __spirv_GroupBroadcast(__spv::Scope::Subgroup, bias, unsigned(feature));
        for (int j = 0; j < token_blocks; ++j) sums[(i * lanes + feature) / 8][j][feature % 8] += value;
      });
    });
  }

  // `count` consecutive features of one token block; a last piece that N cuts goes element by element.
  template <int count, int feature, int j> [[gnu::always_inline]] void store_piece(int64 element) const {
    using Element = std::conditional_t<problem::output == Dtype::f32, float, int16>;
    using Piece = vec<Element, count> __attribute__((aligned(16)));
    Element* d = static_cast<Element*>(args.d) + element;
    vec<Element, count> values;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float sum = sums[(feature + i) / 8][j][i % 8];
      if constexpr (problem::output == Dtype::f32) values[i] = sum;
      else values[i] = round_to_output(sum);
    }
    if (first_feature + feature + count <= problem::n) {
      *reinterpret_cast<Piece*>(d) = values;
    } else if constexpr (problem::n % count != 0) {
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (first_feature + feature + i < problem::n) d[i] = values[i];
    }
  }

  const Arguments& args;
  const Tile& tile;
  int lane, first_token, first_feature;
  Block weights, tokens;
  WeightPrefetch weight_prefetch;
  TokenPrefetchOf<Part::height> token_prefetch;
  int64 token[token_blocks];
  vec<float, 8> sums[feature_blocks][token_blocks];
};

}  // namespace moe_xe
