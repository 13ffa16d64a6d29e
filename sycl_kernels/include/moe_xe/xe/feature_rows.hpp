// A sub-group's weights in [E, N, K] as dpas operands A, 8 features each: dense ones as they lie, or made of codes.
#pragma once
#include <moe_xe/xe/k_loop.hpp>
#include <moe_xe/xe/no_numbers.hpp>
#include <moe_xe/xe/scales.hpp>

namespace moe_xe {

template <int variant> class DenseRows {
  using Part = Shape<variant>;
  static constexpr int load_rows = Part::run_columns < 32 ? Part::run_columns : 32;  // a block message has 32 rows at most
  static constexpr int run_loads = Part::run_columns / load_rows;

 public:
  struct Step {
    vec<int16, 2 * load_rows> rows[Part::columns / load_rows];
  };

  [[gnu::always_inline]] DenseRows(const Arguments& args, const Tile& tile, int first_feature, int)
      : blocks{block(args, tile, 0, first_feature), block(args, tile, Part::runs - 1, first_feature)} {}

  template <int ahead> [[gnu::always_inline]] Step load() const {
    Step step;
    unrolled<Part::columns / load_rows>([&](auto i) __attribute__((always_inline)) {
      step.rows[i] = blocks[i / run_loads].template load_rows<load_rows, ahead * x_per_step, i % run_loads * 32>();
    });
    return step;
  }
  // 8 features' 32 bytes.
  template <int half, int i> [[gnu::always_inline]] static vec<int16, 8> operand(const Step& step) {
    constexpr int eights = load_rows / 8;
    return slice<half * eights + i % eights, 8>(step.rows[i / eights]);
  }
  template <int steps> [[gnu::always_inline]] void move() const {
    for (int run = 0; run < Part::runs; ++run) blocks[run].move_x(steps * x_per_step);
  }

 private:
  [[gnu::always_inline]] static Block block(const Arguments& args, const Tile& tile, int run, int first_feature) {
    const WeightRun place = weight_run(args, tile, run);
    return Block(place.surface, first_step(tile) * x_per_step, place.column + first_feature, 16, load_rows, 2);
  }

  Block blocks[2];
};

// Each sub-group makes operands of its own codes, which load in the checkpoint's order: a message's blocks have 16 codes of each row, as
// an operand has.
template <int variant> class CodeRows {
  using Part = Shape<variant>;
  static constexpr int round_elements = unroll * step_elements;
  static_assert(round_elements == 128, "SCALE_ROUND in moe_xe/plan/xe/rules.py");
  static constexpr int load_rows = Part::run_columns < 32 ? Part::run_columns : 32, run_loads = Part::run_columns / load_rows;
  static constexpr int load_steps = 8 / code_bits, load_blocks = 2 * load_steps, block_bytes = 16 * code_bits / 8;
  static constexpr int operand_registers = code_bits / 4, eights = load_rows / 8;
  static constexpr int vectors = (Part::columns + 15) / 16;    // of 16 rows of codes, one a lane

 public:
  [[gnu::always_inline]] CodeRows(const Arguments& args, const Tile& tile, int first_feature, int lane)
      : args(args), tile(tile), first_feature(first_feature), lane(lane),
        blocks{block(args, tile, 0, first_feature), block(args, tile, Part::runs - 1, first_feature)} {
    const ExpertCodes codes = codes_of(args, tile.expert);
    for (int v = 0; v < vectors; ++v) {
      rows[v].go_to(codes, feature_of(v));
      rows[v].load(0);
    }
  }

  // Codes of a step, and where a round begins, its scales.
  template <int ahead> [[gnu::always_inline]] void load() {
    if constexpr (ahead % load_steps == 0)
      unrolled<Part::columns / load_rows>([&](auto i) __attribute__((always_inline)) {
        constexpr int x = ahead * code_step_bytes, y = i % run_loads * 32;
        codes[i] = blocks[i / run_loads].template load_bytes<load_blocks, block_bytes, load_rows, x, y>();
      });
    if constexpr (ahead == 0) {
      next += round_elements;
      for (auto& row : rows) {
        row.take();
        row.load(next / int(problem::group_columns) * scale_bytes);
      }
    }
  }

  // Before half a step's operands.
  template <int ahead, int half> [[gnu::always_inline]] void begin() {
    constexpr int k = ahead * step_elements + half * 16, group_elements = round_elements / ScaledRows<round_elements>::groups;
    if constexpr (k % group_elements == 0)
      for (auto& row : rows) row.template begin_group<k / group_elements>();
  }

  template <int ahead, int half, int i> [[gnu::always_inline]] vec<int32, 4> operand() {
    constexpr int at = ((ahead % load_steps * 2 + half) * eights + i % eights) * operand_registers;
    vec<int32, 4> words;
    if constexpr (code_bits == 4) words = spread(int32(codes[i / eights][at]));
    else words = spread(slice<at / 2, 2>(codes[i / eights]));
    if constexpr (watches_codes) no_numbers.watch(slice<at / 2, 2>(codes[i / eights]));
    complete<i % 2>(words, rows[i / 2].factors);
    return words;
  }

  template <int steps> [[gnu::always_inline]] void move() {
    for (int run = 0; run < Part::runs; ++run) blocks[run].move_x(steps * code_step_bytes);
  }

  // Sums of codes that are no numbers become none.
  template <int columns> [[gnu::always_inline]] void spoil(vec<float, 8> (&sums)[Part::columns / 8][columns]) const {
    if (!no_numbers.any()) return;
    unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
      const float factor = NoNumbers::factor_of(codes_of(args, tile.expert), feature_of(v));
      unrolled<(Part::columns < 16 ? Part::columns : 16)>([&](auto row) __attribute__((always_inline)) {
        const float of_row = __spirv_GroupBroadcast(__spv::Scope::Subgroup, factor, unsigned(row));
        for (auto& block : sums[v * 2 + row / 8]) block[row % 8] *= of_row;
      });
    });
  }

 private:
  // The lane's row of a vector's, the last one for those beyond.
  [[gnu::always_inline]] int feature_of(int vector) const {
    const int feature = vector * 16 + lane, run = Part::runs > 1 && feature >= Part::run_columns ? 1 : 0;
    const int first = Part::runs > 1 ? tile.column / 2 + run * (int(out_n) - Part::run_columns) : tile.column;
    const int column = first + first_feature + feature;
    return column < int(problem::n) ? column : int(problem::n) - 1;
  }
  [[gnu::always_inline]] static Block block(const Arguments& args, const Tile& tile, int run, int first_feature) {
    const WeightRun place = weight_run(args, tile, run);
    return Block(place.surface, 0, place.column + first_feature, block_bytes, load_rows, load_blocks);
  }

  const Arguments& args;
  const Tile& tile;
  const int first_feature, lane;
  Block blocks[2];
  vec<int32, load_rows / 2> codes[Part::columns / load_rows];
  ScaledRows<round_elements> rows[vectors];
  NoNumbers no_numbers;
  int next = 0;      // element of K where the next round begins
};

template <int variant> using FeatureRows = std::conditional_t<quantised, CodeRows<variant>, DenseRows<variant>>;

}  // namespace moe_xe
