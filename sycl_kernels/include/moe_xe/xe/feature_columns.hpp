// A sub-group's weights in [E, K, N] as dpas operands B, 16 features each, whose pairs along K interleave (VNNI): dense ones load so, those
// of codes are written so.
#pragma once
#include <moe_xe/xe/k_loop.hpp>
#include <moe_xe/xe/no_numbers.hpp>
#include <moe_xe/xe/scales.hpp>

namespace moe_xe {

template <int variant> class DenseColumns {
  using Part = Shape<variant>;
  static constexpr int column_blocks = Part::columns / 16, run_blocks = column_blocks / Part::runs;
  static constexpr int weight_blocks = element_bytes == 4 || run_blocks == 1 ? 1 : 2;  // of 16 columns a message

 public:
  struct Step {
    vec<int32, 8> columns[column_blocks][2];
  };

  [[gnu::always_inline]] DenseColumns(const Arguments& args, const Tile& tile, int first_feature, int)
      : blocks{block(args, tile, 0, first_feature), block(args, tile, Part::runs - 1, first_feature)} {}

  template <int ahead> [[gnu::always_inline]] Step load() const {
    Step step;
    unrolled<column_blocks / weight_blocks>([&](auto message) __attribute__((always_inline)) {
      constexpr int run_messages = run_blocks / weight_blocks;
      constexpr int x = message % run_messages * weight_blocks * 16, y = ahead * step_elements;
      const Block& run = blocks[message / run_messages];
      vec<int32, weight_blocks * 16> values;
      if constexpr (element_bytes == 4) values = run.template load_words<x, y>();
      else values = run.template load_vnni<weight_blocks * 16, x, y>();
      unrolled<weight_blocks * 2>([&](auto part) __attribute__((always_inline)) {
        step.columns[message * weight_blocks + part / 2][part % 2] = slice<part, 8>(values);
      });
    });
    return step;
  }
  template <int half, int j> [[gnu::always_inline]] static vec<int32, 8> operand(const Step& step) { return step.columns[j][half]; }
  template <int steps> [[gnu::always_inline]] void move() const {
    for (int run = 0; run < Part::runs; ++run) blocks[run].move_y(steps * step_elements);
  }

 private:
  [[gnu::always_inline]] static Block block(const Arguments& args, const Tile& tile, int run, int first_feature) {
    const WeightRun place = weight_run(args, tile, run);
    return Block(place.surface, place.column + first_feature, first_step(tile) * step_elements, 16, step_elements, weight_blocks);
  }

  Block blocks[2];
};

// A step has 32 rows of codes: two times 16, each of which is half a step and has scales of its own. They load a step ahead.
template <int variant> class CodeColumns {
  using Part = Shape<variant>;
  static constexpr int block_bytes = 16 * code_bits / 8, most_blocks = 64 / block_bytes / 2;   // a message has 16 registers at most
  static constexpr int column_blocks = Part::columns / 16, load_blocks = column_blocks < most_blocks ? column_blocks : most_blocks;
  static constexpr int registers = code_bits / 4;       // of 8 rows of a block
  using Rows = ScaledRows<Part::columns>;
  static_assert(Part::runs == 1, "columns are one run, in which groups begin where blocks do");
  static_assert((Part::columns & (Part::columns - 1)) == 0, "groups and messages cut columns without a rest");

 public:
  struct Step {
    vec<int32, load_blocks * 4 * registers> codes[column_blocks / load_blocks];
  };

  [[gnu::always_inline]] CodeColumns(const Arguments& args, const Tile& tile, int first_feature, int lane)
      : codes(codes_of(args, tile.expert)), lane(lane), first_feature(tile.column + first_feature),
        offset(this->first_feature / int(problem::group_columns) * scale_bytes),
        block(weight_run(args, tile, 0).surface, this->first_feature * code_bits / 8, 0, block_bytes, step_elements, load_blocks) {
    load_scales();
  }

  template <int ahead> [[gnu::always_inline]] Step load() {
    Step step;
    unrolled<column_blocks / load_blocks>([&](auto i) __attribute__((always_inline)) {
      constexpr int x = i * load_blocks * block_bytes, y = ahead * step_elements;
      step.codes[i] = block.template load_bytes<load_blocks, block_bytes, step_elements, x, y>();
    });
    for (auto& half : rows) half.take();
    next += step_elements;
    load_scales();
    return step;
  }

  template <int half, int j> [[gnu::always_inline]] vec<int32, 8> operand(const Step& step) {
    constexpr int group_blocks = column_blocks / Rows::groups;
    if constexpr (j % group_blocks == 0) rows[half].template begin_group<j / group_blocks>();
    const auto first = rows_of<half * 2, j>(step), second = rows_of<half * 2 + 1, j>(step);
    if constexpr (watches_codes) {
      no_numbers.watch(first);
      no_numbers.watch(second);
    }
    return completed_columns(spread(first), spread(second), rows[half].factors);
  }

  template <int steps> [[gnu::always_inline]] void move() const { block.move_y(steps * step_elements); }

  // Sums of codes that are no numbers become none.
  template <int rows> [[gnu::always_inline]] void spoil(vec<float, 8> (&sums)[rows][column_blocks]) const {
    if (!no_numbers.any()) return;
    unrolled<column_blocks>([&](auto j) __attribute__((always_inline)) {
      const int feature = first_feature + j * 16 + lane;
      const float factor = NoNumbers::factor_of(codes, feature < int(problem::n) ? feature : int(problem::n) - 1);
      for (auto& eight : sums) eight[j] *= factor;
    });
  }

 private:
  // 8 rows of a block.
  template <int eight, int j> [[gnu::always_inline]] static auto rows_of(const Step& step) {
    constexpr int at = (j % load_blocks * 4 + eight) * registers;
    const auto& loaded = step.codes[j / load_blocks];
    if constexpr (code_bits == 4) return int32(loaded[at]);
    else return slice<at / 2, 2>(loaded);
  }

  [[gnu::always_inline]] void load_scales() {
    unrolled<2>([&](auto half) __attribute__((always_inline)) {
      const int row = next + half * 16 + lane;
      rows[int(half)].go_to(codes, row < int(problem::k) ? row : int(problem::k) - 1);
      rows[int(half)].load(offset);
    });
  }

  const ExpertCodes codes;
  const int lane, first_feature, offset;     // first_feature: of n
  Block block;
  Rows rows[2];
  NoNumbers no_numbers;
  int next = 0;      // row of the step that comes next
};

template <int variant> using FeatureColumns = std::conditional_t<quantised, CodeColumns<variant>, DenseColumns<variant>>;

}  // namespace moe_xe
