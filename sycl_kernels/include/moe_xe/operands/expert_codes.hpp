// One expert's quantised weights: where its codes and scales lie, and one weight at a time as a float. Rows and columns are those of
// memory, where columns are contiguous: of [N, K] or, of [K, N] weights, the other way round.
#pragma once
#include <moe_xe/operands/expert_weights.hpp>

namespace moe_xe {

constexpr bool quantised = problem::codes != Codes::none;
constexpr bool int8_products = problem::input == Dtype::i8;    // of codes with codes
constexpr bool converts = quantised && !int8_products;         // codes become numbers of the activations' type
constexpr int code_bits = problem::codes == Codes::int4 || problem::codes == Codes::uint4 || problem::codes == Codes::e2m1 ? 4 : 8;
constexpr bool rows_are_n = problem::weights == WeightLayout::enk;
constexpr int64 grid_rows = ((rows_are_n ? problem::n : problem::k) + problem::group_rows - 1) / problem::group_rows;
constexpr int64 grid_columns = ((rows_are_n ? problem::k : problem::n) + problem::group_columns - 1) / problem::group_columns;
static_assert(!quantised || problem::shared == 0, "shared experts have launches of their own");

constexpr int size_of(ScaleType type) { return type == ScaleType::f32 ? 4 : type == ScaleType::f16 || type == ScaleType::bf16 ? 2 : 1; }

struct ExpertCodes {
  const unsigned char* codes;
  const unsigned char* scales;   // [grid_rows, grid_columns]
  const unsigned char* zeros;    // the same, or null
  float global_scale;
  int64 row_bytes;               // between rows of codes
};

inline ExpertCodes codes_of(const Arguments& args, int expert) {
  const int64 grid_bytes = expert * grid_rows * grid_columns * size_of(problem::scale_type);
  return {static_cast<const unsigned char*>(args.w) + expert * args.w_expert_stride * code_bits / 8,
          static_cast<const unsigned char*>(args.scales) + grid_bytes, static_cast<const unsigned char*>(args.zeros) + grid_bytes,
          problem::has_global_scales ? args.global_scales[expert] : 1.0f, args.w_stride * code_bits / 8};
}

// The number that a code stands for. No number on the way is a denormal, which a device may take for zero.
template <Codes codes> constexpr float number_of(unsigned code) {
  if constexpr (codes == Codes::int4) return float(int(code << 28) >> 28);
  else if constexpr (codes == Codes::uint4) return float(code);
  else if constexpr (codes == Codes::int8) return float(static_cast<signed char>(code));
  else {
    constexpr int mantissa = codes == Codes::e2m1 ? 1 : codes == Codes::e4m3 ? 3 : 2;
    constexpr int bits = codes == Codes::e2m1 ? 3 : 7, bias = codes == Codes::e2m1 ? 1 : codes == Codes::e4m3 ? 7 : 15;
    const unsigned size = code & ((1u << bits) - 1);
    float value = __builtin_bit_cast(float, (size << (23 - mantissa)) + ((127u - bias) << 23));
    if (size < 1u << mantissa) value = float(size) * __builtin_bit_cast(float, (128u - bias - mantissa) << 23);
    if (codes == Codes::e5m2 && size == 0x7c) value = __builtin_inff();
    if ((codes == Codes::e4m3 && size == 0x7f) || (codes == Codes::e5m2 && size > 0x7c)) value = __builtin_nanf("");
    return code >> bits & 1 ? -value : value;
  }
}

// Element `index` of scales or zeros.
inline float grid_value(const unsigned char* grid, int64 index) {
  if constexpr (problem::scale_type == ScaleType::f32) return reinterpret_cast<const float*>(grid)[index];
  else if constexpr (problem::scale_type == ScaleType::f16) return widened<Dtype::f16>(reinterpret_cast<const _Float16*>(grid)[index]);
  else if constexpr (problem::scale_type == ScaleType::bf16)
    return widened<Dtype::bf16>(reinterpret_cast<const unsigned short*>(grid)[index]);
  else if constexpr (problem::scale_type == ScaleType::e4m3) return number_of<Codes::e4m3>(grid[index]);
  else {
    const unsigned exponent = grid[index];
    return exponent == 255 ? __builtin_nanf("") : __builtin_bit_cast(float, exponent == 0 ? 0x400000u : exponent << 23);
  }
}

inline int64 group_of(int64 row, int64 column) {
  return row / problem::group_rows * grid_columns + column / problem::group_columns;
}

// A group's scale, and its zero in code units.
inline float scale_at(const ExpertCodes& w, int64 row, int64 column) {
  return grid_value(w.scales, group_of(row, column)) * w.global_scale;
}
inline float zero_at(const ExpertCodes& w, int64 row, int64 column) {
  return problem::has_zeros ? grid_value(w.zeros, group_of(row, column)) : problem::zero;
}

// One byte, and nothing beside it: volatile, as compilers join neighbours to wider loads, which a GPU wants aligned.
inline unsigned code_at(const ExpertCodes& w, int64 row, int64 column) {
  const volatile unsigned char* codes = w.codes + row * w.row_bytes;
  if constexpr (code_bits == 8) return codes[column];
  else return codes[column / 2] >> column % 2 * 4 & 15;
}

inline float weight_at(const ExpertCodes& w, int64 row, int64 column) {
  return (number_of<problem::codes>(code_at(w, row, column)) - zero_at(w, row, column)) * scale_at(w, row, column);
}

}  // namespace moe_xe
