// What happens to fp32 sums on the CPU device before they are stored: row factor, bias, activation, one rounding.
#pragma once
#include <moe_xe/activation.hpp>
#include <moe_xe/operands/expert_weights.hpp>
#include <moe_xe/operands/rows.hpp>
#include <moe_xe/cpu/vector.hpp>
#include <moe_xe/queue/split_k.hpp>

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
  Output* d;                // null where the row is not written
  float scale, a_scale;
  float* sums = nullptr;    // where K is split: those of the row's part, by output column
};

// Floats between rows of a part's sums: gates, then up values.
constexpr int part_stride = (config::tile_width + 2 * width - 1) / (2 * width) * 2 * width + 2 * width;
static_assert(!split || config::heights[0] * part_stride <= part_floats, "CpuConfig.part_floats");

inline OutputRow output_row(const Arguments& args, int64 sorted_row) {
  const int64 target = target_row(args, sorted_row);
  return {target < 0 ? nullptr : static_cast<Output*>(args.d) + target * args.d_stride, scale_of(args, sorted_row),
          a_scale_of(args, sorted_row)};
}

inline Floats load_biases(const Element<problem::bias>* biases, int64 column, int part, int count) {
  if constexpr (problem::pairs != Pairs::interleaved) return load_floats<problem::bias>(biases + weight_column(column, part), count);
  float values[width] = {};
  for (int i = 0; i < width && i < count; ++i) values[i] = widened<problem::bias>(biases[weight_column(column + i, part)]);
  return load<Floats>(values);
}

// The output columns [column, column + width), of which `count` exist, of these sums.
inline void write_outputs(const Arguments& args, int expert, const OutputRow& row, int64 column, int count, Floats gate, Floats up) {
  if (count <= 0 || !row.d) return;
  if constexpr (problem::input == Dtype::i8) {
    gate *= row.a_scale;
    if constexpr (paired) up *= row.a_scale;
  }
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

// Sums of K, or of a part of it, are done.
inline void finish(const Arguments& args, int expert, const OutputRow& row, int64 column, int count, Floats gate, Floats up) {
  if constexpr (!split) return write_outputs(args, expert, row, column, count, gate, up);
  if (count <= 0) return;
  store(row.sums + column, gate);
  if constexpr (paired) store(row.sums + part_stride / 2 + column, up);
}

// All parts' sums at the same place of each, the first one's at `from`.
inline Floats sum_of_parts(const float* from) {
  Floats sum = load<Floats>(from);
#pragma unroll 1
  for (int part = 1; part < config::splits; ++part) sum += load<Floats>(from + part * part_floats);
  return sum;
}

}  // namespace moe_xe
