// Dot products along K over codes: numbers are decoded in registers, and a group's scale multiplies its part of the sum.
#pragma once
#include <moe_xe/cpu/code_weights.hpp>
#include <moe_xe/cpu/decode.hpp>

namespace moe_xe {

// A span is of one group, or of several, each in lanes of its own; other groups' rows are packed.
constexpr bool one_group = problem::group_columns >= problem::k;
constexpr bool spans_have_a_group = one_group || problem::group_columns % span == 0;
constexpr bool lanes_have_a_group =
    spans_have_a_group || (code_bits == 4 && span % problem::group_columns == 0 && problem::group_columns % (span / width) == 0);
constexpr int span_groups = lanes_have_a_group && !spans_have_a_group ? int(span / problem::group_columns) : 1;

// Codes that are summed before their sum is multiplied with a scale.
constexpr int most_summed = 16 * span;
constexpr int summed_codes = !spans_have_a_group                                      ? span
                             : one_group || problem::group_columns % most_summed == 0 ? most_summed
                             : problem::group_columns < most_summed                   ? int(problem::group_columns)
                                                                                      : span;

// The scales (or zeros) of so many groups of some rows as floats.
constexpr int grid_block = 64;
template <int columns> struct Grids {
  float values[columns][grid_block];

  void load_from(const unsigned char* CodeWeights::Column::*grid, const CodeWeights::Column* w, int64 group, int count) {
#pragma unroll 1
    for (int column = 0; column < columns; ++column) {
      const unsigned char* from = w[column].*grid + group * size_of(problem::scale_type);
#pragma unroll 1
      for (int i = 0; i < count; i += width) store(values[column] + i, grid_values(from + i * size_of(problem::scale_type), count - i));
    }
  }

  // Each lane's, for the span that begins in this group.
  Floats at(int column, int group) const {
    const float* from = values[column] + group;
    if constexpr (spans_have_a_group) return *from;
    else return in_lanes(load<Several<float, span_groups>>(from), std::make_integer_sequence<int, width>{});
  }

 private:
  template <int... lane> static Floats in_lanes(Several<float, span_groups> some, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(some, some, (lane * span_groups / width)...);
  }
};

// Adds `codes` elements of K from k on, whole spans of one group each lane.
template <int codes, int rows, int columns>
void add_codes(const Token* const* a, const CodeWeights::Column* w, int64 k, const Grids<columns>& scales, const Grids<columns>& zeros,
               int group, Floats (&sums)[rows][columns]) {
  constexpr int chains = rows == 1 && number_vectors > 1 ? 2 : 1;
  Floats parts[rows][columns][chains], tokens[rows];
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    tokens[row] = 0.f;
#pragma unroll
    for (int column = 0; column < columns; ++column)
#pragma unroll
      for (int chain = 0; chain < chains; ++chain) parts[row][column][chain] = 0.f;
  }
#pragma unroll 1
  for (int64 end = k + codes, at = k; at < end; at += span) {
    if constexpr (problem::has_zeros)
#pragma unroll
      for (int row = 0; row < rows; ++row)
#pragma unroll
        for (int i = 0; i < number_vectors; ++i) tokens[row] = add_products(tokens[row], tokens_at(a[row], at, i), ones());
#pragma unroll
    for (int column = 0; column < columns; ++column) {
      Numbers numbers[number_vectors];
      decode(w[column].codes + at * code_bits / 8, numbers);
#pragma unroll
      for (int row = 0; row < rows; ++row)
#pragma unroll
        for (int i = 0; i < number_vectors; ++i) {
          Floats& part = parts[row][column][i % chains];
          part = add_products(part, tokens_at(a[row], at, i), numbers[i]);
        }
    }
  }
#pragma unroll
  for (int column = 0; column < columns; ++column)
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      Floats part = parts[row][column][0];
      if constexpr (chains > 1) part += parts[row][column][1];
      if constexpr (problem::has_zeros) part -= zeros.at(column, group) * tokens[row];
      sums[row][column] += scales.at(column, group) * part;
    }
}

// What is left of K after the last whole span, by way of memory.
template <int left, int rows, int columns>
void add_rest(const Token* const* a, const CodeWeights::Column* w, const Grids<columns>& scales, const Grids<columns>& zeros, int group,
              Floats (&sums)[rows][columns]) {
  constexpr int64 whole = problem::k - left;
  Partial<unsigned char, span * code_bits / 8> codes[columns];
  Partial<Input, span> elements[rows];
  const Token* tokens[rows];
  CodeWeights::Column rest[columns];
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
    if constexpr (spread_tokens) tokens[row] = a[row] + whole / elements_per_step;
    else {
      elements[row] = {a[row] + whole, left};
      tokens[row] = elements[row].element;
    }
  }
#pragma unroll 1
  for (int column = 0; column < columns; ++column) {
    codes[column] = {w[column].codes + whole * code_bits / 8, left * code_bits / 8};
    rest[column].codes = codes[column].element;
  }
  add_codes<span>(tokens, rest, 0, scales, zeros, group, sums);
}

// Lane `column` of result[row]: row a[row] of A times the weights of w[column].
template <int rows, int columns>
void dot(const Token* const* a, const CodeWeights& weights, const CodeWeights::Column* w, Floats (&result)[rows]) {
  constexpr int64 block = one_group ? problem::k : grid_block * problem::group_columns;
  constexpr int line = 64 * 8 / code_bits;    // codes of a cache line
  Grids<columns> scales, zeros;
  Floats sums[rows][columns];
#pragma unroll
  for (int row = 0; row < rows; ++row)
#pragma unroll
    for (int column = 0; column < columns; ++column) sums[row][column] = 0.f;
#pragma unroll 1
  for (int64 k = 0; k < problem::k;) {
    const int64 first = k, first_group = k / problem::group_columns, end = problem::k - k < block ? problem::k : k + block;
    const int groups = grid_columns - first_group < grid_block ? int(grid_columns - first_group) : grid_block;
    scales.load_from(&CodeWeights::Column::scales, w, first_group, groups);
    if constexpr (problem::has_zeros) zeros.load_from(&CodeWeights::Column::zeros, w, first_group, groups);
    const auto group = [&] { return one_group ? 0 : int((k - first) / problem::group_columns); };
#pragma unroll 1
    for (; k + summed_codes <= end; k += summed_codes) {
      if (CodeWeights::begins_line(k))
#pragma unroll
        for (int column = 0; column < columns; ++column)
#pragma unroll
          for (int ahead = 0; ahead < summed_codes; ahead += line) weights.prefetch_ahead(w[column], k + ahead);
      add_codes<summed_codes>(a, w, k, scales, zeros, group(), sums);
    }
    if constexpr (summed_codes > span)
#pragma unroll 1
      for (; k + span <= end; k += span) add_codes<span>(a, w, k, scales, zeros, group(), sums);
    if constexpr (problem::k % span > 0)
      if (k < end) {
        add_rest<int(problem::k % span)>(a, w, scales, zeros, group(), sums);
        k = end;
      }
  }
#pragma unroll
  for (int row = 0; row < rows; ++row) result[row] = sums_of(sums[row]) * (weights.global_scale() * (code_bits == 8 ? code_unit : 1.f));
}

}  // namespace moe_xe
