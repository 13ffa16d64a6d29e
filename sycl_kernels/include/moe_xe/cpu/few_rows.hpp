// Tiles of so few rows that packing the weights would cost more than it saves: weights are read in place, once.
#pragma once
#include <moe_xe/cpu/dot.hpp>
#include <moe_xe/cpu/epilogue.hpp>

namespace moe_xe {

// Up to config::unpacked_rows rows of A and where their results go. tokens: the rows as cpu/spans.hpp takes them.
struct FewRows {
  const Input* a[config::unpacked_rows];
  const Packed* tokens[config::unpacked_rows];
  OutputRow d[config::unpacked_rows];
  int count;
  KRange part;
};

// A row's sums become results: gates with their up values in every second place, or `second` behind them.
inline void finish_row(const Arguments& args, int expert, const OutputRow& row, const float* sums, int second, int64 column, int columns) {
  constexpr bool alternate = problem::pairs == Pairs::interleaved;
#pragma unroll 1
  for (int done = 0; done < columns; done += width) {
    const float* from = sums + (alternate ? 2 * done : done);
    Floats gate = load<Floats>(from), up = paired ? load<Floats>(from + (alternate ? width : second)) : gate;
    if constexpr (alternate) unweave(gate, up, gate, up);
    finish(args, expert, row, column + done, columns - done, gate, up);
  }
}

// Some rows of [N, K] weights as they lie side by side: number i is a column's, or its gate's or up value's.
struct WeightRows {
  static constexpr int each = problem::pairs == Pairs::interleaved ? 2 : 1;   // of a column
  const Weights& w;
  int64 column;   // the first one
  int run, count;

  // Those past the last one repeat it.
  Weights::Column at(int i) const {
    const int index = i < count ? i : count - 1;
    return w.column(column + index / each, each == 2 ? index % 2 : run);
  }
};

// sums[row][i]: lanes of row first + row of A times row begin + i of weights.
template <int rows>
void dots(int wanted, const FewRows& few, int first, const WeightRows& weights, int begin, Floats (*sums)[width]) {
  if constexpr (rows > 1)
    if (wanted < rows) return dots<rows - 1>(wanted, few, first, weights, begin, sums);
  constexpr int at_a_time = columns_for(rows);
#pragma unroll 1
  for (int i = 0; i < width && begin + i < weights.count; i += at_a_time) {
    Weights::Column some[at_a_time];
#pragma unroll
    for (int next = 0; next < at_a_time; ++next) some[next] = weights.at(begin + i + next);
    Floats lanes[rows][at_a_time];
    dot(few.tokens + first, some, few.part, lanes);
#pragma unroll
    for (int row = 0; row < rows; ++row)
#pragma unroll
      for (int next = 0; next < at_a_time; ++next) sums[row][i + next] = lanes[row][next];
  }
}

// [N, K] weights times `rows` rows from `first` on. What does not depend on their number is there once.
inline void run_dots(int rows, const Arguments& args, int expert, const FewRows& few, int first, const Weights& w, int64 column, int columns) {
  constexpr int at_once = 64, each = WeightRows::each, runs = problem::pairs == Pairs::halves ? 2 : 1;
  const float unit = unit_of(w);
#pragma unroll 1
  for (int done = 0; done < columns; done += at_once) {
    const int count = columns - done < at_once ? columns - done : at_once;
    float results[config::dot_rows][runs * each * at_once];
#pragma unroll 1
    for (int run = 0; run < runs; ++run)
#pragma unroll 1
      for (int begin = 0; begin < each * count; begin += width) {
        Floats sums[config::dot_rows][width];
        if (each * count - begin < width) __builtin_memset(sums, 0, sizeof sums);
        dots<config::dot_rows>(rows, few, first, {w, column + done, run, each * count}, begin, sums);
#pragma unroll 1
        for (int row = 0; row < rows; ++row) store(results[row] + run * at_once + begin, sums_of(sums[row]) * unit);
      }
#pragma unroll 1
    for (int row = 0; row < rows; ++row) finish_row(args, expert, few.d[first + row], results[row], at_once, column + done, count);
  }
}

// [K, N] weights stream by once, some rows of K at a time, and are added to sums that stay in the first cache: of the last
// summed_steps elements of K, and of all before them.
struct StreamedSums {
  static constexpr int depth = 8, ahead = 2 * depth;
  static constexpr int stride = int(round_up(config::tile_width, 2 * width)) + 2 * width;   // gates, then up values
  static constexpr int levels = problem::k > summed_steps ? 2 : 1;
  static_assert(summed_steps % depth == 0);
  float sums[levels][config::unpacked_rows][stride] = {};

  const float* totals(int row) const { return sums[levels - 1][row]; }

  // `columns` neighbours in rows of memory, from `first` on, for the part's elements of K of every row.
  void add(const FewRows& few, const Weights& w, Weights::Column first, int first_sum, int columns) {
    const int64 end = few.part.end;
#pragma unroll 1
    for (int64 k = few.part.begin; k < end; k += depth) {
      float tokens[config::unpacked_rows][depth];
      for (int row = 0; row < few.count; ++row)
#pragma unroll
        for (int i = 0; i < depth; ++i) tokens[row][i] = k + i < end ? widened<problem::input>(few.a[row][k + i]) : 0.0f;
      int column = 0;
      if (k + depth <= end && w.has_whole_vectors(first))
#pragma unroll 1
        for (; column + block <= columns; column += block)
          add_block<block / width, true>(few, tokens, w, first, k, first_sum, column, block);
#pragma unroll 1
      for (; column < columns; column += width)
        add_block<1, false>(few, tokens, w, first, k, first_sum, column, columns - column, int(end - k));
      if (levels > 1 && ((k + depth) % summed_steps == 0 || k + depth >= end)) add_to_totals(few.count, first_sum, columns);
    }
  }

 private:
  static constexpr int block = 64 / int(sizeof(Input)) > width ? 64 / int(sizeof(Input)) : width;   // a cache line, or a vector

  void add_to_totals(int rows, int first_sum, int columns) {
#pragma unroll 1
    for (int row = 0; row < rows; ++row)
#pragma unroll 1
      for (int column = 0; column < columns; column += width) {
        float *sum = sums[0][row] + first_sum + column, *total = sums[levels - 1][row] + first_sum + column;
        store(total, load<Floats>(total) + load<Floats>(sum));
        store(sum, Floats(0.f));
      }
  }

  template <int vectors, bool whole>
  void add_block(const FewRows& few, const float (&tokens)[config::unpacked_rows][depth], const Weights& w, Weights::Column first, int64 k,
                 int first_sum, int column, int count, int left = depth) {
    Floats weights[depth][vectors];
    if constexpr (whole) {
#pragma unroll
      for (int i = 0; i < depth; ++i) {
        w.prefetch_row(first, k + i + ahead, column);
#pragma unroll
        for (int v = 0; v < vectors; ++v) weights[i][v] = w.neighbours(first, k + i, column + v * width);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < depth; ++i)     // rows past K repeat one that exists, times zero
        weights[i][0] = w.neighbours(first, i < left ? k + i : k, column, count);
    }
#pragma unroll 1
    for (int row = 0; row < few.count; ++row) {
      float* to = sums[0][row] + first_sum + column;
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
        Floats sum = load<Floats>(to + v * width);
#pragma unroll
        for (int i = 0; i < depth; ++i)
          if (whole || i < left) sum = tokens[row][i] * weights[i][v] + sum;
        store(to + v * width, sum);
      }
    }
  }
};

inline void run_streamed(const Arguments& args, int expert, const FewRows& few, const Weights& w, int64 column, int columns) {
  StreamedSums streamed;
  constexpr int second = int(round_up(config::tile_width / 2, width));   // from a gate's sum to its up value's
  streamed.add(few, w, w.column(column, 0), 0, woven ? 2 * columns : columns);
  if constexpr (paired && !woven) streamed.add(few, w, w.column(column, 1), second, columns);
#pragma unroll 1
  for (int row = 0; row < few.count; ++row) finish_row(args, expert, few.d[row], streamed.totals(row), second, column, columns);
}

}  // namespace moe_xe
