// Elements as they lie in memory, one at a time: widening to fp32 and the one rounding of a result.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

template <Dtype dtype> struct ElementOf { using type = unsigned short; };
template <> struct ElementOf<Dtype::f16> { using type = _Float16; };
template <> struct ElementOf<Dtype::f32> { using type = float; };
template <> struct ElementOf<Dtype::i8> { using type = signed char; };
template <Dtype dtype> using Element = typename ElementOf<dtype>::type;   // bf16: its bits

template <Dtype dtype> float widened(Element<dtype> value) {
  if constexpr (dtype == Dtype::bf16) return __builtin_bit_cast(float, unsigned(value) << 16);
  else return float(value);
}

// Round to nearest even; NaN stays NaN (its payload could carry into the exponent).
template <Dtype dtype> Element<dtype> rounded(float value) {
  if constexpr (dtype == Dtype::bf16) {
    const unsigned bits = __builtin_bit_cast(unsigned, value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const unsigned nearest = bits + 0x7fffu + (bits >> 16 & 1u);
    return Element<dtype>((is_nan ? bits | 0x400000u : nearest) >> 16);
  } else {
    return Element<dtype>(value);
  }
}

}  // namespace moe_xe
