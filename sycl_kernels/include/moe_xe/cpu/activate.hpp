// A row on the CPU device: one work-item has all of it, and takes a vector of columns after the other.
#pragma once
#include <moe_xe/cpu/team.hpp>
#include <moe_xe/cpu/vector.hpp>

namespace moe_xe {

struct Math {
  static Floats exp(Floats x, float factor) { return __spirv_ocl_exp(factor * x); }
  static Floats reciprocal(Floats x) { return 1.0f / x; }
  static Floats whole(Floats x) { return __spirv_ocl_rint(x); }
};

template <class Work> void for_rows(const Team& team, int64 rows, Work work) {
  for (int64 row = team.group; row < rows; row += team.num_groups) work(row);
}

// work(first column, how many of a vector's columns exist), whole vectors without asking how many.
template <class Work> void for_columns(const Team&, Work work) {
  constexpr int whole = problem::row_size / width * width;
#pragma unroll 1
  for (int column = 0; column < whole; column += width) work(column, width);
  if constexpr (whole < problem::row_size) work(whole, problem::row_size - whole);
}

// Whole numbers.
inline void store_codes(signed char* to, Floats values, int count) {
  const auto codes = __builtin_convertvector(values, Vector<signed char>);
  if (count >= width) return store(to, codes);
  Partial<signed char, width> some;
  store(some.element, codes);
  some.copy_to(to, count);
}

inline unsigned greatest(const Team&, Dwords values) {
  unsigned found = 0;
#pragma unroll
  for (int i = 0; i < width; ++i) found = values[i] > found ? values[i] : found;
  return found;
}

inline void store_sum(const Team&, Floats values, float* to) { *to = sum_of(values); }

// The inverse of `unweave`, its low or its high vector.
template <int half> struct Alternating {
  static constexpr int of(int i) { return half * (width / 2) + i / 2 + i % 2 * width; }
};
inline void weave(Floats first, Floats second, Floats& low, Floats& high) {
  low = shuffle<Alternating<0>>(first, second);
  high = shuffle<Alternating<1>>(first, second);
}

}  // namespace moe_xe
