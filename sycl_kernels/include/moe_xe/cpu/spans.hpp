// Spans of K: so many elements of rows of [N, K] weights are decoded at once and multiplied with rows of A, as integers or as numbers.
#pragma once
#include <moe_xe/cpu/code_words.hpp>
#include <moe_xe/cpu/decode.hpp>

namespace moe_xe {

// Elements of K that are decoded at once.
constexpr int span = integer_dots ? vector_codes : number_span;
constexpr int64 bytes_of(int64 elements) { return quantised ? elements * code_bits / 8 : elements * int64(sizeof(Input)); }
constexpr int span_bytes = int(bytes_of(span)), span_token = integer_dots ? token_vectors * width : span / elements_per_step;
constexpr int64 whole_units(int64 value, int64 unit) {     // of no negative value: a shift, where the unit is a power of two
  return int64(static_cast<unsigned long>(value) / static_cast<unsigned long>(unit));
}
constexpr int64 token_place(int64 k) { return whole_units(k, span) * span_token; }

// A span is of one group, or of several, each in lanes of its own; other groups' rows are packed.
constexpr bool spans_have_a_group = one_group || problem::group_columns % span == 0;
constexpr int lane_elements = integer_dots ? lane_codes : byte_tables ? 16 : span;    // neighbours in one lane, or in four
constexpr bool lanes_have_a_group =
    spans_have_a_group || (span % problem::group_columns == 0 && problem::group_columns % lane_elements == 0);
constexpr int span_groups = lanes_have_a_group && !spans_have_a_group ? int(span / problem::group_columns) : 1;

// Elements of K that are summed before their sum is multiplied with a scale, or added to a total.
constexpr int most_summed = 16 * span;
constexpr int summed = !quantised                                                ? summed_steps * vector_elements
                       : !spans_have_a_group                                     ? span
                       : one_group || problem::group_columns % most_summed == 0 ? most_summed
                       : problem::group_columns < most_summed                    ? int(problem::group_columns)
                                                                                 : span;

// Rows of A as they are multiplied; behind each, where codes have zeros, the sums of its elements that are summed at once.
constexpr int64 whole_spans = problem::k / span * span;
constexpr int64 token_sums = quantised && problem::has_zeros ? (whole_spans + summed - 1) / summed + 1 : 0;
static_assert(token_sums == 0 || integer_dots);
constexpr int64 token_row = integer_dots ? (problem::k + span - 1) / span * span_token : packed_stride;
constexpr int64 token_stride = round_up(token_row + token_sums * width, 16);

// A row of A as `dot` takes it.
inline void spread_tokens(const Input* from, Packed* to) {
  if constexpr (integer_dots) spread_words(from, to);
  else spread_numbers(from, to);
  if constexpr (token_sums > 0) {
    auto* sums = reinterpret_cast<float*>(to + token_row);
    Shorts ones[word_vectors];
#pragma unroll
    for (int i = 0; i < word_vectors; ++i) ones[i] = 1;
#pragma unroll 1
    for (int64 k = 0, left; k < problem::k; k += left) {
      left = k < whole_spans ? whole_spans - k < summed ? whole_spans - k : summed : span;
      Floats sum = 0.f;
#pragma unroll 1
      for (int64 at = k; at < k + left; at += span) sum += sums_of_words(ones, to + token_place(at));
      store(sums, sum);
      sums += width;
    }
  }
}

// Rows of weights at once, as registers allow.
constexpr int columns_for(int rows) {
  if (rows == 1 || (quantised && !wide)) return 1;
  return quantised || !wide || rows > 6 ? 2 : 4;
}

// How far ahead rows of weights are asked for: of one row within the stream, else the next rows.
constexpr int64 bytes_ahead(int columns) { return columns == 1 ? config::prefetch_bytes : columns * bytes_of(problem::k); }

// `spans` of rows of codes times rows of A, from this place on of these.
template <int rows, int columns>
void multiply_words(const Packed* const* a, int64 token, const unsigned char* const (&w)[columns], int64 spans, Floats (&sums)[rows][columns]) {
  constexpr bool one_span = summed == span;
  if constexpr (!one_span) __builtin_memset(sums, 0, sizeof sums);
  const int64 end = spans * span_bytes;
#pragma unroll 1
  for (int64 at = 0; at < end; at += span_bytes, token += span_token) {
    Shorts words[columns][word_vectors];
#pragma unroll
    for (int column = 0; column < columns; ++column) {
      prefetch(w[column] + at + bytes_ahead(columns));
      read_words(w[column] + at, words[column]);
    }
#pragma unroll
    for (int row = 0; row < rows; ++row)
#pragma unroll
      for (int column = 0; column < columns; ++column) {
        const Floats part = sums_of_words(words[column], a[row] + token);
        if constexpr (one_span) sums[row][column] = part;
        else sums[row][column] += part;
      }
  }
}

// The same of numbers.
template <int rows, int columns>
void multiply_numbers(const Packed* const* a, int64 token, const unsigned char* const (&w)[columns], int64 spans, Floats (&sums)[rows][columns]) {
  constexpr int vectors = quantised || columns == 1 ? number_vectors : chunk_vectors, bytes = span_bytes / number_vectors * vectors;
  // Sums enough to keep the FMA units busy.
  constexpr int most = (wide ? 8 : 4) / (rows * columns), useful = summed > span || vectors == 1 ? vectors : vectors / 2;
  constexpr int chains = most < 1 ? 1 : most < useful ? most : useful;
  const Packed* tokens[rows];
  const unsigned char* weights[columns];
  Floats parts[rows][columns][chains];
#pragma unroll
  for (int column = 0; column < columns; ++column) weights[column] = w[column];
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    tokens[row] = a[row] + token;
#pragma unroll
    for (int column = 0; column < columns; ++column)
#pragma unroll
      for (int chain = 0; chain < chains; ++chain) parts[row][column][chain] = 0.f;
  }
  const int64 end = spans * span_bytes;
#pragma unroll 1
  for (int64 at = 0, place = 0; at < end; at += bytes, place += vectors * width) {
    Numbers numbers[columns][vectors];
#pragma unroll
    for (int column = 0; column < columns; ++column) {
#pragma unroll
      for (int line = 0; line < bytes; line += 64) prefetch(weights[column] + at + bytes_ahead(columns) + line);
      decode(weights[column] + at, numbers[column]);
    }
#pragma unroll
    for (int row = 0; row < rows; ++row)
#pragma unroll
      for (int i = 0; i < vectors; ++i) {
        const Numbers elements = load<Numbers>(tokens[row] + place + i * width);
#pragma unroll
        for (int column = 0; column < columns; ++column) {
          Floats& part = parts[row][column][i % chains];
          part = multiply_add(part, elements, numbers[column][i]);
        }
      }
  }
#pragma unroll
  for (int row = 0; row < rows; ++row)
#pragma unroll
    for (int column = 0; column < columns; ++column) {
      sums[row][column] = parts[row][column][0];
#pragma unroll
      for (int chain = 1; chain < chains; ++chain) sums[row][column] += parts[row][column][chain];
    }
}

}  // namespace moe_xe
