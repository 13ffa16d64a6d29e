// What happens to fp32 sums on a GPU before they are stored: row factor, bias, activation; rounding is the caller's.
#pragma once
#include <moe_xe/activation.hpp>
#include <moe_xe/operands/expert_weights.hpp>
#include <moe_xe/operands/rows.hpp>
#include <type_traits>

namespace moe_xe {

struct ScalarMath {
  static float exp(float x, float factor) { return __spirv_ocl_native_exp2(x * (factor * 1.44269504f)); }
  static float reciprocal(float x) { return __spirv_ocl_native_recip(x); }
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

// One output; `up` and `up_bias` count where columns are pairs.
[[gnu::always_inline]] inline float output_of(float gate, float up, float bias, float up_bias, float scale) {
  if constexpr (problem::row_scale == RowScale::sums) {
    gate *= scale;
    up *= scale;
  }
  if constexpr (problem::has_bias) {
    gate += bias;
    up += up_bias;
  }
  float value;
  if constexpr (paired) value = activated<ScalarMath>(gate, up);
  else value = activated<ScalarMath>(gate);
  return problem::row_scale == RowScale::outputs ? value * scale : value;
}

}  // namespace moe_xe
