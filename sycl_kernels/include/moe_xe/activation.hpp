// The activations, in fp32, for a float (GPUs) or a vector of floats (the CPU device): `Math` has reciprocal and exp(x, factor),
// e to the power of factor * x, so that what an instruction multiplies by is one constant.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

// Of factor * x.
template <class Math, class Value> inline Value sigmoid(Value x, float factor = 1.0f) {
  return Math::reciprocal(1.0f + Math::exp(x, -factor));
}

// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
template <class Math, class Value> inline Value erf(Value x) {
  const Value size = x < 0.0f ? -x : x;
  const Value t = Math::reciprocal(0.3275911f * size + 1.0f);
  const Value sum = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const Value result = 1.0f - sum * Math::exp(Value(size * size), -1.0f);
  return x < 0.0f ? -result : result;
}

// Cuts at the limit.
template <class Value> inline Value limited(Value value, bool below) {
  if constexpr (problem::has_limit) {
    constexpr float limit = problem::act_limit;
    value = value > limit ? Value(limit) : value;
    if (below) value = value < -limit ? Value(-limit) : value;
  }
  return value;
}

// act(gate). Comparisons are written so that NaN stays NaN.
template <class Math, class Value> inline Value activated(Value gate) {
  gate = limited(gate, false);
  if constexpr (problem::act == Act::silu) return gate * sigmoid<Math>(gate);
  else if constexpr (problem::act == Act::gelu) return 0.5f * gate * (1.0f + erf<Math>(Value(gate * 0.70710678f)));
  else if constexpr (problem::act == Act::gelu_tanh) return gate * sigmoid<Math>(Value(gate + 0.044715f * gate * gate * gate), 1.59576912f);
  else if constexpr (problem::act == Act::swiglu_oai) return gate * sigmoid<Math>(gate, problem::act_alpha);
  else if constexpr (problem::act == Act::relu2) {
    const Value positive = gate < 0.0f ? Value(0.0f) : gate;
    return positive * positive;
  } else return gate;
}

// The output of a pair of columns.
template <class Math, class Value> inline Value activated(Value gate, Value up) {
  const Value value = activated<Math>(gate);
  up = limited(up, true);
  if constexpr (problem::act == Act::swiglu_oai) return value * up + value;
  else return value * up;
}

}  // namespace moe_xe
