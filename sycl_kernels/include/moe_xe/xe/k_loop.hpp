// The loop over K that both weight layouts share: 64 bytes of every row a step, and what is prefetched ahead of it.
#pragma once
#include <moe_xe/xe/atoms.hpp>
#include <moe_xe/operands/expert_codes.hpp>
#include <moe_xe/operands/rows.hpp>
#include <moe_xe/queue/split_k.hpp>

namespace moe_xe {

inline constexpr int element_bytes = size_of(problem::input);
inline constexpr int step_bytes = 64;
inline constexpr int step_elements = step_bytes / element_bytes;
inline constexpr int k_bytes = int(problem::k) * element_bytes;
inline constexpr int k_steps = (k_bytes + step_bytes - 1) / step_bytes;
inline constexpr int tail_bytes = k_bytes % step_bytes;
inline constexpr int code_step_bytes = step_elements * code_bits / 8;   // of a row of codes
inline constexpr int x_per_step = 32;  // block messages see rows as 16-bit elements, whatever they are
static_assert(k_bytes % 16 == 0, "rows end at a multiple of 16 bytes");
static_assert(config::prefetch_distance * x_per_step < 512, "an immediate offset of a block message");

// Steps that share address arithmetic through immediate offsets; gathered operands A have the most of it.
inline constexpr int unroll = problem::gathered && problem::weights == WeightLayout::ekn ? 8 : 4;

// Steps of every part of K but the last one, which has all beyond `steps_before`.
inline constexpr int part_steps = int(part_of_k(unroll * step_elements)) / step_elements;
inline constexpr int steps_before = (config::splits - 1) * part_steps;
static_assert(!split || part_steps > 0, "a round of steps in each part");
inline int first_step(const Tile& tile) { return split ? tile.part * part_steps : 0; }

// Where the first step's dpas start the sums, it and what makes the others whole rounds come before the loop. Beside rounds of
// eight steps that would spill (on PVC, and with a tail). Rounds of codes begin where their scales do.
inline constexpr bool first_apart = unroll < 8 && !converts;
inline constexpr int whole_steps = k_bytes / step_bytes - steps_before;    // of the last part, and all of it
inline constexpr int first_steps = !first_apart ? 0 : split ? unroll : (whole_steps - 1) % unroll + 1;

// step<ahead, first, tail>(): `ahead` steps behind the last move; `first`: there are no sums yet; `tail`: the rows end
// before 64 bytes. move<steps>() follows so many steps.
template <class Work> [[gnu::always_inline]] inline void loop_over_k(Work& work, int part) {
  constexpr int last_rounds = (whole_steps - first_steps) / unroll, rest = k_steps - steps_before - first_steps - last_rounds * unroll;
  const bool is_last = !split || part == config::splits - 1;
  const int rounds = is_last ? last_rounds : (part_steps - first_steps) / unroll;
  unrolled<first_steps>([&](auto ahead) __attribute__((always_inline)) { work.template step<ahead, ahead == 0, false>(); });
  if constexpr (first_steps > 0 && k_steps - steps_before > first_steps) work.template move<first_steps>();
  for (int round = 0; round < rounds; ++round) {
    unrolled<unroll>([&](auto ahead) __attribute__((always_inline)) { work.template step<ahead, false, false>(); });
    work.template move<unroll>();
  }
  if (!is_last) return;
  unrolled<rest>([&](auto ahead) __attribute__((always_inline)) {
    work.template step<ahead, false, (tail_bytes > 0 && ahead == rest - 1)>();
  });
}

// The geometry of one tile height: which part of the tile a sub-group computes.
template <int variant> struct Shape {
  static constexpr int height = config::heights[variant];
  static constexpr int rows = config::sub_group_rows[variant];        // tokens of a sub-group
  static constexpr int columns = config::sub_group_columns[variant];  // weights' columns of a sub-group
  static constexpr int outputs = paired ? columns / 2 : columns;
  static constexpr int across = config::tile_width / columns;         // sub-groups side by side
  static constexpr int down = height / rows;                          // and below each other
  static constexpr int sub_groups = down * across;                    // the others of the work-group have no part
  // Where gates and up values are halves of the weights, a sub-group's columns are two runs; else one.
  static constexpr int runs = problem::pairs == Pairs::halves ? 2 : 1, run_columns = columns / runs;

  static int first_row(int sub_group) { return sub_group / across * rows; }
  static int first_column(int sub_group) { return sub_group % across * run_columns; }
  static int first_output(const Tile& tile, int sub_group) {
    return (paired ? tile.column / 2 : tile.column) + sub_group % across * outputs;
  }
};

inline Surface token_surface(const Arguments& args, const Tile& tile) {
  return {args.a, k_bytes, int(tile.row) + tile.rows, int(args.a_stride) * element_bytes};
}

// Bytes of so many weights that lie side by side.
template <class Number> constexpr Number weight_bytes(Number weights) {
  return quantised ? weights * code_bits / 8 : weights * element_bytes;
}

// One run of the tile's columns of weights: which surface they are in, and the first one's place there.
struct WeightRun {
  Surface surface;
  int column;
};

// Both sides of each choice are values before it is made. Branches on the same condition would be threaded through the
// creation of a Block, and IGC loses the order of loads and moves where two creations of a payload meet.
inline WeightRun weight_run(const Arguments& args, const Tile& tile, int run) {
  constexpr bool rows_are_k = problem::weights == WeightLayout::ekn, halves = problem::pairs == Pairs::halves;
  const bool is_shared = problem::shared > 0 && tile.expert < problem::shared;
  const int64 first = reinterpret_cast<int64>(args.shared_w), second = reinterpret_cast<int64>(args.shared_up);
  const int64 shared_base = (run ? second : first) + tile.expert * args.shared_expert_stride * element_bytes;
  const int64 routed_expert = unsigned(tile.expert - problem::shared);
  const int64 routed_base = reinterpret_cast<int64>(args.w) + routed_expert * weight_bytes(args.w_expert_stride);
  const int64 base = is_shared ? shared_base : routed_base;
  const int shared_stride = int(args.shared_stride), routed_stride = int(args.w_stride);
  const int pitch = weight_bytes(is_shared ? shared_stride : routed_stride);
  constexpr int shared_columns = int(halves ? out_n : problem::n), routed_columns = int(problem::n);
  const int columns = is_shared ? shared_columns : routed_columns;
  const int first_of_run = run * int(out_n), none = 0;
  const int column = halves ? tile.column / 2 + (is_shared ? none : first_of_run) : tile.column;
  return {{reinterpret_cast<const void*>(base), weight_bytes(rows_are_k ? columns : int(problem::k)),
           rows_are_k ? int(problem::k) : columns, pitch}, column};
}

// Address of the token of one of the tile's rows. Rows past the tile's last repeat it.
inline int64 gathered_token(const Arguments& args, const Tile& tile, int row) {
  const unsigned source = unsigned(source_row(args, tile.row + (row < tile.rows ? row : tile.rows - 1)));
  return reinterpret_cast<int64>(args.a) + int64(source) * unsigned(args.a_stride * element_bytes);
}

// Prefetch of the tile's weights, 64-byte lines shared out evenly: in [E, N, K] a line is a step of one column, in
// [E, K, N] a row of K has several and a step has several rows. Sub-groups below each other share their own columns, so that
// nobody needs those whose columns are all beyond N.
template <int variant> class WeightPrefetch {
 public:
  [[gnu::always_inline]] WeightPrefetch(const Arguments& args, const Tile& tile, int sub_group)
      : WeightPrefetch(weight_run(args, tile, part_of(sub_group) / run_sub_groups), part_of(sub_group) % run_sub_groups, first_step(tile)) {}
  template <int ahead> [[gnu::always_inline]] void step() const {
    if constexpr (ahead % line_steps == 0) unrolled<messages>([&](auto i) __attribute__((always_inline)) {
      if constexpr (rows_are_k) block.template prefetch<rows, i * 32, ahead * step_elements>();
      else block.template prefetch<rows, ahead / line_steps * x_per_step, i * rows>();
    });
  }
  template <int steps> [[gnu::always_inline]] void move() const {
    if constexpr (rows_are_k) block.move_y(steps * step_elements);
    else block.move_x(steps * x_per_step / line_steps);
  }

 private:
  using Part = Shape<variant>;
  static constexpr bool rows_are_k = problem::weights == WeightLayout::ekn;
  // Steps that a line of a column has, and how far ahead a whole number of lines is.
  static constexpr int line_steps = quantised && !rows_are_k ? step_bytes / code_step_bytes : 1;
  static constexpr int distance = (config::prefetch_distance + line_steps - 1) / line_steps * line_steps;
  static constexpr int run_sub_groups = Part::sub_groups / Part::runs;
  static constexpr int all_lines = rows_are_k ? step_elements * weight_bytes(config::tile_width) / 64 : config::tile_width;
  static constexpr int lines = all_lines / Part::sub_groups, most = rows_are_k ? step_elements : 32;
  static constexpr int rows = lines < most ? lines : most, messages = lines / rows;
  static constexpr int down = step_elements / rows;  // [E, K, N]: sub-groups that share 64 bytes' width of the tile
  static_assert(lines * Part::sub_groups == all_lines && rows * messages == lines);
  static_assert(!rows_are_k || (down * rows == step_elements && run_sub_groups % down == 0));

  static int part_of(int sub_group) {
    constexpr int sharers = Part::down / Part::runs;     // of a sub-group's columns of one run
    if constexpr (Part::down % Part::runs > 0) return sub_group;
    const int row = sub_group / Part::across, column = sub_group % Part::across;
    return row / sharers * run_sub_groups + column * sharers + row % sharers;
  }

  [[gnu::always_inline]] WeightPrefetch(const WeightRun& run, int part, int first)
      : block(run.surface, rows_are_k ? weight_bytes(run.column) / 2 + part / down * messages * 32 : first * x_per_step / line_steps,
              rows_are_k ? part % down * rows + first * step_elements : run.column + part * lines, 32, rows, 1) {
    unrolled<distance>([&](auto ahead) __attribute__((always_inline)) { step<ahead>(); });
    move<distance>();
  }

  Block block;
};

// Prefetch of the tile's tokens, rows shared out evenly.
template <int variant> class TokenPrefetch {
 public:
  [[gnu::always_inline]] TokenPrefetch(const Arguments& args, const Tile& tile, int sub_group, int)
      : block(token_surface(args, tile), first_step(tile) * x_per_step, int(tile.row) + sub_group * rows, 32, rows, 1) {
    unrolled<config::prefetch_distance>([&](auto ahead) __attribute__((always_inline)) { step<ahead>(); });
    move<config::prefetch_distance>();
  }
  template <int ahead> [[gnu::always_inline]] void step() const {
    block.template prefetch<rows, ahead * x_per_step, 0>();
  }
  template <int steps> [[gnu::always_inline]] void move() const { block.move_x(steps * x_per_step); }

 private:
  static constexpr int rows = (Shape<variant>::height + Shape<variant>::sub_groups - 1) / Shape<variant>::sub_groups;
  Block block;
};

// The same for gathered tokens: each lane takes 64-byte lines of its own.
template <int variant> class GatheredTokenPrefetch {
 public:
  [[gnu::always_inline]] GatheredTokenPrefetch(const Arguments& args, const Tile& tile, int sub_group, int lane)
      : offset(first_step(tile) * step_bytes) {
    for (int i = 0; i < vectors; ++i) {
      const int row = i * 16 + lane / lines;
      address[i] = gathered_token(args, tile, sub_group * rows + (row < rows ? row : rows - 1)) + lane % lines * step_bytes;
    }
    for (int step_ahead = 0; step_ahead < config::prefetch_distance; step_ahead += unroll) {
      unrolled<unroll>([&](auto ahead) __attribute__((always_inline)) { step<ahead>(); });
      move<unroll>();
    }
  }
  template <int ahead> [[gnu::always_inline]] void step() const {
    if constexpr (ahead % lines == 0 && last_offset > 0)
      for (int i = 0; i < vectors; ++i) prefetch_lines<ahead * step_bytes>(address[i] + offset);
  }
  // The last rounds fetch the end of the rows again: nothing past a row may be touched.
  template <int steps> [[gnu::always_inline]] void move() {
    offset += steps * step_bytes;
    if (offset > last_offset) offset = last_offset;
  }

 private:
  static constexpr int rows = (Shape<variant>::height + Shape<variant>::sub_groups - 1) / Shape<variant>::sub_groups;
  static constexpr int vectors = (rows + 15) / 16;
  static constexpr int lines = rows > 8 ? 1 : rows > 4 ? 2 : 4;  // of a row in one message
  static constexpr int last_offset = k_bytes - unroll * step_bytes;
  int64 address[vectors];
  int offset;
};

template <int variant>
using TokenPrefetchOf = std::conditional_t<problem::gathered, GatheredTokenPrefetch<variant>, TokenPrefetch<variant>>;

}  // namespace moe_xe
