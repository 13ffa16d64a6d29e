// The inner loops: a block of rows by a panel of columns with all sums in registers, and a dot product along K for
// tiles of so few rows that packing the weights would cost more than it saves.
#pragma once
#include <moe_xe/pack_cpu.hpp>

namespace moe_xe {

inline Floats multiply_add(Floats sum, PackedVector a, PackedVector b) {
  if constexpr (bf16_pairs) {
    // "0" and not "+v": a tied read-write operand loses its tie on the way through SPIR-V.
    asm("vdpbf16ps %3,%2,%0" : "=v"(sum) : "0"(sum), "v"(b), "v"(a));
    return sum;
  } else {
    return __builtin_bit_cast(Floats, a) * __builtin_bit_cast(Floats, b) + sum;
  }
}

// Where a block's sums lie between K blocks and before they are rounded.
struct SumsInMemory {
  float* first;
  int stride;
};

// `wanted` rows of packed A times a panel; a null `from` starts at zero. One instance for each number of rows, so that
// all sums are registers.
template <int rows>
void multiply(int wanted, const Packed* a, const PackedVector* panel, int steps, SumsInMemory from, SumsInMemory to) {
  if constexpr (rows > 1)
    if (wanted < rows) return multiply<rows - 1>(wanted, a, panel, steps, from, to);
  Floats sums[rows][panel_vectors];
#pragma unroll
  for (int row = 0; row < rows; ++row)
#pragma unroll
    for (int v = 0; v < panel_vectors; ++v) {
      sums[row][v] = 0.f;
      if (from.first) sums[row][v] = load<Floats>(from.first + row * from.stride + v * width);
    }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    PackedVector b[panel_vectors];
#pragma unroll
    for (int v = 0; v < panel_vectors; ++v) b[v] = panel[v];
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      const PackedVector broadcast = a[row * packed_stride];
#pragma unroll
      for (int v = 0; v < panel_vectors; ++v) sums[row][v] = multiply_add(sums[row][v], broadcast, b[v]);
    }
    ++a;
    panel += panel_vectors;
  }
#pragma unroll
  for (int row = 0; row < rows; ++row)
#pragma unroll
    for (int v = 0; v < panel_vectors; ++v) store(to.first + row * to.stride + v * width, sums[row][v]);
}

// Lane `column` of result[row]: row a[row] of A times row w[column] of W[n, k], both as they lie in memory. `ahead`:
// elements from a row of W to the one to prefetch meanwhile.
template <int rows, int columns>
inline void dot(const Input* const* a, const Input* const* w, int64 ahead, Floats (&result)[rows]) {
  static_assert(columns <= width);
  Floats sums[rows][columns];
#pragma unroll
  for (int row = 0; row < rows; ++row)
#pragma unroll
    for (int column = 0; column < columns; ++column) sums[row][column] = 0.f;
  const auto add = [&](auto load_at) {
    Dwords weights[columns];
#pragma unroll
    for (int column = 0; column < columns; ++column) weights[column] = load_at(w[column]);
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      const Dwords tokens = load_at(a[row]);
#pragma unroll
      for (int half = 0; half < chunk_vectors; ++half)
#pragma unroll
        for (int column = 0; column < columns; ++column)
          sums[row][column] = multiply_add(sums[row][column], packed(tokens, half), packed(weights[column], half));
    }
  };
  constexpr int64 whole = problem::k / chunk * chunk;
#pragma unroll 1
  for (int64 k = 0; k < whole; k += chunk) {
#pragma unroll
    for (int column = 0; column < columns; ++column) prefetch(w[column] + k + ahead);
    add([=](const Input* row) { return load_chunk(row + k); });
  }
  if constexpr (whole < problem::k)
    add([=](const Input* row) { return load_chunk(row + whole, int(problem::k - whole)); });
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    result[row] = 0.f;
#pragma unroll
    for (int column = 0; column < columns; ++column) result[row][column] = sum_of(sums[row][column]);
  }
}

}  // namespace moe_xe
