// What happens to fp32 sums on the CPU device before they are stored: row factor, bias, activation, one rounding.
#pragma once
#include <moe_xe/activation.hpp>
#include <moe_xe/operands/expert_weights.hpp>
#include <moe_xe/operands/rows.hpp>
#include <moe_xe/cpu/vector.hpp>

namespace moe_xe {

struct VectorMath {
  static Floats reciprocal(Floats x) { return 1.0f / x; }
  // exp(factor * x) = 2^n * exp(r), |r| <= ln(2)/2, by a polynomial of degree 6 (Cephes' coefficients), within 2 units in the last place.
  static Floats exp(Floats x, float factor) {
    x *= factor;
    x = x > 88.0f ? Floats(88.0f) : x < -87.0f ? Floats(-87.0f) : x;
    constexpr float round_by = 12582912.0f;   // 1.5 * 2^23: adding it rounds to a whole number in the low bits
    const Floats shifted = x * 1.44269504f + round_by, n = shifted - round_by;
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats sum = 1.9875691500e-4f * r + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * r * r + r + 1.0f;
    const Dwords exponent = (__builtin_bit_cast(Dwords, shifted) - __builtin_bit_cast(unsigned, round_by)) << 23;
    return x == x ? __builtin_bit_cast(Floats, __builtin_bit_cast(Dwords, sum) + exponent) : x;
  }
};

struct OutputRow {
  Output* d;       // null where the row is not written
  float scale;
};

inline OutputRow output_row(const Arguments& args, int64 sorted_row) {
  const int64 target = target_row(args, sorted_row);
  return {target < 0 ? nullptr : static_cast<Output*>(args.d) + target * args.d_stride, scale_of(args, sorted_row)};
}

inline Floats load_biases(const Element<problem::bias>* biases, int64 column, int part, int count) {
  if constexpr (problem::pairs != Pairs::interleaved) return load_floats<problem::bias>(biases + weight_column(column, part), count);
  float values[width] = {};
  for (int i = 0; i < width && i < count; ++i) values[i] = widened<problem::bias>(biases[weight_column(column + i, part)]);
  return load<Floats>(values);
}

// Output columns [column, column + width), of which `count` exist.
inline void finish(const Arguments& args, int expert, const OutputRow& row, int64 column, int count, Floats gate, Floats up) {
  if (count <= 0 || !row.d) return;
  if constexpr (problem::row_scale == RowScale::sums) {
    gate *= row.scale;
    if constexpr (paired) up *= row.scale;
  }
  if constexpr (problem::has_bias)
    if (const auto* biases = biases_of(args, expert)) {
      gate += load_biases(biases, column, 0, count);
      if constexpr (paired) up += load_biases(biases, column, 1, count);
    }
  Floats value;
  if constexpr (paired) value = activated<VectorMath>(gate, up);
  else value = activated<VectorMath>(gate);
  if constexpr (problem::row_scale == RowScale::outputs) value *= row.scale;
  store_rounded<problem::output>(row.d + column, value, count);
}

}  // namespace moe_xe
