// What happens to fp32 sums on a GPU before they are stored: row factor, bias, activation; rounding is the caller's.
#pragma once
#include <moe_xe/activation.hpp>
#include <moe_xe/operands/expert_weights.hpp>
#include <moe_xe/operands/rows.hpp>
#include <type_traits>

namespace moe_xe {

struct ScalarMath {
  static float exp(float x, float factor) { return __spirv_ocl_native_exp2(x * (factor * 1.44269504f)); }
  static float reciprocal(float x) { return 1.0f / x; }     // a CPU's own has 12 bits
};

// A column beyond the last one has its bias: outputs there are never stored. No branches: IGC copies all sums where control
// flow meets. Volatile for pairs of 16-bit neighbours: IGC joins them to 32-bit messages, which an odd stride would misalign.
inline float bias_at(const Arguments& args, int expert, int column, int part) {
  constexpr bool alone = problem::pairs == Pairs::interleaved && problem::bias != Dtype::f32;
  using Bias = Element<problem::bias>;
  const int routed = expert - problem::shared;
  const auto* biases = static_cast<const std::conditional_t<alone, volatile Bias, Bias>*>(args.bias) + (routed < 0 ? 0 : routed) * args.bias_stride;
  const float bias = widened<problem::bias>(biases[weight_column(column < out_n ? column : int(out_n) - 1, part)]);
  return routed < 0 ? 0.0f : bias;
}

// A sum as activations take it.
[[gnu::always_inline]] inline float input_of(float sum, float bias, float scale) {
  if constexpr (problem::row_scale == RowScale::sums) sum *= scale;
  if constexpr (problem::has_bias) sum += bias;
  return sum;
}

// `up` counts where columns are pairs.
template <class Math, class Value> [[gnu::always_inline]] inline Value output_of(Value gate, Value up) {
  if constexpr (paired) return activated<Math>(gate, up);
  else return activated<Math>(gate);
}

}  // namespace moe_xe
