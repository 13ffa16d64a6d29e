// Dot products along K, for tiles of so few rows that packing the weights would cost more than it saves.
#pragma once
#include <moe_xe/cpu/pack.hpp>

namespace moe_xe {

// Lane `column` of result[row]: row a[row] of A times the weights of w[column], both as they lie in memory, over this part of K.
template <int rows, int columns>
inline void dot(const Input* const* a, const DenseWeights& weights, const Input* const* w, KRange part, Floats (&result)[rows]) {
  static_assert(columns <= width);
  constexpr int64 summed = summed_steps / chunk_vectors * chunk;   // elements along K
  constexpr bool two_levels = problem::k / chunk * chunk > summed;
  const int64 whole = part.end / chunk * chunk;
  Floats sums[rows][columns], totals[rows][columns];
  const auto for_sums = [](auto work) {
#pragma unroll
    for (int row = 0; row < rows; ++row)
#pragma unroll
      for (int column = 0; column < columns; ++column) work(row, column);
  };
  for_sums([&](int row, int column) { sums[row][column] = 0.f; });
  if constexpr (two_levels) for_sums([&](int row, int column) { totals[row][column] = 0.f; });
  const auto add = [&](auto tokens_of, auto weights_of) {
    Dwords loaded[columns];
#pragma unroll
    for (int column = 0; column < columns; ++column) loaded[column] = weights_of(column);
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      const Dwords tokens = tokens_of(row);
#pragma unroll
      for (int half = 0; half < chunk_vectors; ++half)
#pragma unroll
        for (int column = 0; column < columns; ++column)
          sums[row][column] = multiply_add(sums[row][column], packed(tokens, half), packed(loaded[column], half));
    }
  };
#pragma unroll 1
  for (int64 k = part.begin; k < whole;) {
    const int64 end = whole - k > summed ? k + summed : whole;
#pragma unroll 1
    for (; k < end; k += chunk) {
#pragma unroll
      for (int column = 0; column < columns; ++column) weights.prefetch_ahead(w[column], k);
      add([=](int row) { return DenseWeights::chunk(a[row], k); }, [=](int column) { return DenseWeights::chunk(w[column], k); });
    }
    if constexpr (two_levels)
      for_sums([&](int row, int column) {
        totals[row][column] += sums[row][column];
        sums[row][column] = 0.f;
      });
  }
  // The last elements by way of memory, in loops: a copy for each vector is slow to compile.
  if (problem::k % chunk != 0 && whole < part.end) {
    const int left = int(part.end - whole);
    Dwords tokens[rows], loaded[columns];
#pragma unroll 1
    for (int row = 0; row < rows; ++row) tokens[row] = DenseWeights::chunk(a[row], whole, left);
#pragma unroll 1
    for (int column = 0; column < columns; ++column) loaded[column] = DenseWeights::chunk(w[column], whole, left);
    add([&](int row) { return tokens[row]; }, [&](int column) { return loaded[column]; });
  }
  if constexpr (two_levels) for_sums([&](int row, int column) { sums[row][column] += totals[row][column]; });
#pragma unroll
  for (int row = 0; row < rows; ++row) result[row] = sums_of(sums[row]);
}

}  // namespace moe_xe
