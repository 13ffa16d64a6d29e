// Dot products along K of rows of [N, K] weights with some rows of A. For one row of A the weights are read as they lie, one row after the
// other: that is the fastest way through memory. For more, a few rows of weights share what is loaded of A.
#pragma once
#include <moe_xe/cpu/spans.hpp>

namespace moe_xe {

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
