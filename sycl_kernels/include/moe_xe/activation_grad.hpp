// The derivatives of activation.hpp's forms, for the same values and the same Math.
#pragma once
#include <moe_xe/activation.hpp>

namespace moe_xe {

// A gradient with respect to a value that was cut at the limit: zero beyond it, whole at it and for NaN.
template <class Value> inline Value passed(Value gradient, Value value, bool below) {
  if constexpr (problem::has_limit) {
    constexpr float limit = problem::act_limit;
    gradient = value > limit ? Value(0.0f) : gradient;
    if (below) gradient = value < -limit ? Value(0.0f) : gradient;
  }
  return gradient;
}

// x * sigmoid(factor * u(x)) has the derivative s * (1 + x * (1 - s) * factor * u'(x)); u_slope: factor * u'(x).
template <class Math, class Value> inline Value sigmoid_slope(Value x, Value u, float factor, Value u_slope) {
  const Value s = sigmoid<Math>(u, factor);
  return s * (1.0f + x * (1.0f - s) * u_slope);
}

// d activated(gate) / d gate. What the values need too (exponentials) is written as there, so that it is computed once.
template <class Math, class Value> inline Value slope(Value gate) {
  const Value x = limited(gate, false);
  Value result;
  if constexpr (problem::act == Act::silu) result = sigmoid_slope<Math>(x, x, 1.0f, Value(1.0f));
  else if constexpr (problem::act == Act::swiglu_oai)
    result = sigmoid_slope<Math>(x, x, problem::act_alpha, Value(problem::act_alpha));
  else if constexpr (problem::act == Act::gelu_tanh)
    result = sigmoid_slope<Math>(x, Value(x + 0.044715f * x * x * x), 1.59576912f,
                                 Value(1.59576912f + 0.21406449f * x * x));
  else if constexpr (problem::act == Act::gelu) {
    const Value u = x * 0.70710678f, size = u < 0.0f ? -u : u;
    result = 0.5f * (1.0f + erf<Math>(u)) + 0.39894228f * x * Math::exp(Value(size * size), -1.0f);
  } else {
    static_assert(problem::act == Act::relu2);
    result = x < 0.0f ? Value(0.0f) : 2.0f * x;
  }
  return passed(result, gate, false);
}

// Gradients of activated(gate, up) times `factor`.
template <class Value> struct PairGradient {
  Value gate, up;
};
template <class Math, class Value> inline PairGradient<Value> gradient(Value gate, Value up, Value factor) {
  Value raised = limited(up, true);
  if constexpr (problem::act == Act::swiglu_oai) raised += 1.0f;
  return {factor * raised * slope<Math>(gate), passed(Value(factor * activated<Math>(gate)), up, true)};
}

}  // namespace moe_xe
