// Dot products along K over codes: numbers are decoded in registers, and a group's scale multiplies its part of the sum.
#pragma once
#include <moe_xe/cpu/code_weights.hpp>
#include <moe_xe/cpu/decode.hpp>

namespace moe_xe {

// A span is of one group, or of several, each in lanes of its own; other groups' rows are packed.
constexpr bool one_group = problem::group_columns >= problem::k;
constexpr bool spans_have_a_group = one_group || problem::group_columns % span == 0;
constexpr bool lanes_have_a_group = spans_have_a_group || (span % problem::group_columns == 0 && problem::group_columns % lane_codes == 0);
constexpr int span_groups = lanes_have_a_group && !spans_have_a_group ? int(span / problem::group_columns) : 1;

// Codes that are summed before their sum is multiplied with a scale.
constexpr int most_summed = 16 * span;
constexpr int summed_codes = !spans_have_a_group                                             ? span
                             : one_group || problem::group_columns % most_summed == 0 ? most_summed
                             : problem::group_columns < most_summed                   ? int(problem::group_columns)
                                                                                      : span;

template <int... lane> Floats in_lanes(Several<float, span_groups> values, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(values, values, (lane * span_groups / width)...);
}
// Each lane's element of a row of scales or zeros, for the span that begins at k.
inline Floats lane_values(const unsigned char* grid, int64 k) {
  const int64 group = k / problem::group_columns;
  if constexpr (spans_have_a_group) return grid_value(grid, group);
  else return in_lanes(grid_values<span_groups>(grid + group * size_of(problem::scale_type)), std::make_integer_sequence<int, width>{});
}

// Adds `codes` elements of K from k on, whole spans of one group each lane.
template <int codes, int rows, int columns>
void add_codes(const Token* const* a, const CodeWeights::Column* w, int64 k, Floats (&sums)[rows][columns]) {
  Floats parts[rows][columns], tokens[rows];
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    tokens[row] = 0.f;
#pragma unroll
    for (int column = 0; column < columns; ++column) parts[row][column] = 0.f;
  }
#pragma unroll 1
  for (int64 end = k + codes, at = k; at < end; at += span) {
    if constexpr (problem::has_zeros)
#pragma unroll
      for (int row = 0; row < rows; ++row)
#pragma unroll
        for (int i = 0; i < number_vectors; ++i) tokens[row] = add_tokens(tokens[row], tokens_at(a[row], at, i));
#pragma unroll
    for (int column = 0; column < columns; ++column) {
      Numbers numbers[number_vectors];
      decode(w[column].codes + at * code_bits / 8, numbers);
#pragma unroll
      for (int row = 0; row < rows; ++row)
#pragma unroll
        for (int i = 0; i < number_vectors; ++i) {
          if constexpr (code_pairs) parts[row][column] = multiply_add(parts[row][column], tokens_at(a[row], at, i), numbers[i]);
          else parts[row][column] += tokens_at(a[row], at, i) * numbers[i];
        }
    }
  }
#pragma unroll
  for (int column = 0; column < columns; ++column) {
    const Floats scales = lane_values(w[column].scales, k);
    Floats zeros = 0.f;
    if constexpr (problem::has_zeros) zeros = lane_values(w[column].zeros, k);
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      if constexpr (problem::has_zeros) parts[row][column] -= zeros * tokens[row];
      sums[row][column] += scales * parts[row][column];
    }
  }
}

// What is left of K after the last whole span, by way of memory.
template <int left, int rows, int columns>
void add_rest(const Token* const* a, const CodeWeights::Column* w, Floats (&sums)[rows][columns]) {
  constexpr int64 whole = problem::k - left, group = whole / problem::group_columns;
  constexpr int size = size_of(problem::scale_type);
  constexpr int groups = spans_have_a_group ? 1 : int((left + problem::group_columns - 1) / problem::group_columns);
  using Grid = Partial<unsigned char, span_groups * size>;
  Partial<unsigned char, span * code_bits / 8> codes[columns];
  Grid scales[columns], zeros[columns];
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
    scales[column] = {w[column].scales + group * size, groups * size};
    if constexpr (problem::has_zeros) zeros[column] = {w[column].zeros + group * size, groups * size};
    rest[column] = {0, codes[column].element, scales[column].element, zeros[column].element};
  }
  add_codes<span>(tokens, rest, 0, sums);
}

// Lane `column` of result[row]: row a[row] of A times the weights of w[column].
template <int rows, int columns>
void dot(const Token* const* a, const CodeWeights& weights, const CodeWeights::Column* w, Floats (&result)[rows]) {
  constexpr int64 whole = problem::k / summed_codes * summed_codes, spans = problem::k / span * span;
  constexpr int line = 64 * 8 / code_bits;    // codes of a cache line
  Floats sums[rows][columns];
#pragma unroll
  for (int row = 0; row < rows; ++row)
#pragma unroll
    for (int column = 0; column < columns; ++column) sums[row][column] = 0.f;
#pragma unroll 1
  for (int64 k = 0; k < whole; k += summed_codes) {
    if (summed_codes >= line || k % line == 0)
#pragma unroll
      for (int column = 0; column < columns; ++column)
#pragma unroll
        for (int ahead = 0; ahead < summed_codes; ahead += line) weights.prefetch_ahead(w[column], k + ahead);
    add_codes<summed_codes>(a, w, k, sums);
  }
  if constexpr (whole < spans)
#pragma unroll 1
    for (int64 k = whole; k < spans; k += span) add_codes<span>(a, w, k, sums);
  if constexpr (spans < problem::k) add_rest<int(problem::k - spans)>(a, w, sums);
#pragma unroll
  for (int row = 0; row < rows; ++row) result[row] = sums_of(sums[row]) * weights.global_scale();
}

}  // namespace moe_xe
