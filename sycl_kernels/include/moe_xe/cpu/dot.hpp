// Dot products along K of rows of [N, K] weights with some rows of A. For one row of A the weights are read as they lie, one row after the
// other: that is the fastest way through memory. For more, a few rows of weights share what is loaded of A.
#pragma once
#include <moe_xe/cpu/code_words.hpp>
#include <moe_xe/cpu/decode.hpp>

namespace moe_xe {

// Elements of K that are decoded at once.
constexpr int span = integer_dots ? vector_codes : number_span;
constexpr int64 bytes_of(int64 elements) { return nibbles ? whole_units(elements, 2) : quantised ? elements : elements * int64(sizeof(Input)); }
constexpr int span_bytes = int(bytes_of(span)), span_token = integer_dots ? token_vectors * width : span / elements_per_step;
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

// `spans` of rows of codes times rows of A, from this place on of these.
template <int rows, int columns>
void multiply_words(const Packed* const* a, int64 token, const unsigned char* const (&w)[columns], int64 spans, Floats (&sums)[rows][columns]) {
  constexpr bool one_span = summed == span;
  constexpr int64 ahead = columns == 1 ? config::prefetch_bytes : columns * bytes_of(problem::k);
  if constexpr (!one_span) __builtin_memset(sums, 0, sizeof sums);
  const int64 end = spans * span_bytes;
#pragma unroll 1
  for (int64 at = 0; at < end; at += span_bytes, token += span_token) {
    Shorts words[columns][word_vectors];
#pragma unroll
    for (int column = 0; column < columns; ++column) {
      prefetch(w[column] + at + ahead);
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
  constexpr int64 ahead = columns == 1 ? config::prefetch_bytes : columns * bytes_of(problem::k);
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
      for (int line = 0; line < bytes; line += 64) prefetch(weights[column] + at + ahead + line);
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

// The scales (or zeros) of a row's groups as floats, so many at a time.
struct Grid {
  static constexpr int most = 64;
  float values[most];

  void load_from(const unsigned char* row, int64 group) {
    const int count = grid_columns - group < most ? int(grid_columns - group) : most;
    row += group * size_of(problem::scale_type);
#pragma unroll 1
    for (int i = 0; i < count; i += width) store(values + i, grid_values(row + i * size_of(problem::scale_type), count - i));
  }

  // Each lane's, for the span that begins in this group.
  Floats at(int64 group) const {
    const float* from = values + group;
    if constexpr (spans_have_a_group) return *from;
    else return in_lanes(load<Several<float, span_groups>>(from), std::make_integer_sequence<int, width>{});
  }

 private:
  template <int... lane> static Floats in_lanes(Several<float, span_groups> some, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(some, some, (lane * span_groups / width)...);
  }
};

// What sums are to be multiplied with at last.
template <class W> float unit_of(const W& weights) {
  if constexpr (quantised) return weights.global_scale() * (integer_dots ? word_unit : number_unit);
  else return 1.f;
}

// Lanes of sums[row][column]: row a[row] of A times the row w[column] of weights, over this part of K.
template <int rows, int columns, class Column>
void dot(const Packed* const* a, const Column (&w)[columns], KRange part, Floats (&sums)[rows][columns]) {
  const unsigned char* weights[columns];
  Grid scales[columns], zeros[columns];
  const auto for_sums = [](auto work) {
#pragma unroll
    for (int row = 0; row < rows; ++row)
#pragma unroll
      for (int column = 0; column < columns; ++column) work(row, column);
  };
  for_sums([&](int row, int column) { sums[row][column] = 0.f; });
#pragma unroll
  for (int column = 0; column < columns; ++column) {
    if constexpr (quantised) weights[column] = w[column].codes;
    else weights[column] = reinterpret_cast<const unsigned char*>(w[column]);
  }
  // `spans` from element k on, of the grids' group or groups from `group` on.
  const auto add = [&](int64 token, const unsigned char* const (&from)[columns], int64 spans, int64 group, int64 sum) {
    Floats parts[rows][columns];
    if constexpr (integer_dots) multiply_words(a, token, from, spans, parts);
    else multiply_numbers(a, token, from, spans, parts);
    for_sums([&](int row, int column) {
      Floats part = parts[row][column];
      if constexpr (quantised && problem::has_zeros) part -= zeros[column].at(group) * load<Floats>(a[row] + token_row + sum * width);
      if constexpr (quantised) sums[row][column] = scales[column].at(group) * part + sums[row][column];
      else sums[row][column] += part;
    });
  };
  constexpr int64 block = one_group || !quantised ? problem::k : Grid::most * problem::group_columns;
  const int64 whole = part.end / span * span;
#pragma unroll 1
  for (int64 begin = part.begin; begin < part.end; begin += block) {
    if constexpr (quantised)
#pragma unroll 1
      for (int column = 0; column < columns; ++column) {
        scales[column].load_from(w[column].scales, whole_units(begin, problem::group_columns));
        if constexpr (problem::has_zeros) zeros[column].load_from(w[column].zeros, whole_units(begin, problem::group_columns));
      }
    const auto group = [=](int64 k) { return one_group ? 0 : whole_units(k - begin, problem::group_columns); };
    const int64 end = whole - begin < block ? whole : begin + block;
    // Whole spans, and once more for what is left of K. Parts of it but the last one are whole spans.
    constexpr int rest_bytes = int(bytes_of(problem::k % span));
    const int64 stop = rest_bytes > 0 && part.end - begin <= block ? part.end : end;
    unsigned char rest[columns][rest_bytes > 0 ? span_bytes : 1];
#pragma unroll 1
    for (int64 k = begin, token = token_place(begin), at = bytes_of(begin), spans; k < stop;
         k += spans * span, token += spans * span_token, at += spans * span_bytes) {
      const int64 left = end - k;
      const bool is_rest = rest_bytes > 0 && left == 0;
      const unsigned char* from[columns];
#pragma unroll
      for (int column = 0; column < columns; ++column) from[column] = weights[column] + at;
      if (is_rest) {
#pragma unroll
        for (int column = 0; column < columns; ++column) {
          __builtin_memset(rest[column], 0, sizeof rest[column]);
          __builtin_memcpy(rest[column], from[column], rest_bytes);
          from[column] = rest[column];
        }
        spans = 1;
      } else {
        const bool all = summed == span || (whole_spans % summed == 0 && !split) || left >= summed;
        spans = whole_units(all ? summed : left, span);
      }
      add(token, from, spans, group(k), is_rest ? token_sums - 1 : whole_units(k, summed));
    }
  }
}

}  // namespace moe_xe
