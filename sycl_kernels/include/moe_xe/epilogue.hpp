// What happens to a tile's fp32 sums before they are stored: bias, then one rounding.
#pragma once
#include <moe_xe/atoms_xe.hpp>

extern __attribute__((sycl_device)) unsigned short __spirv_ConvertFToBF16INTEL(float);
extern __attribute__((sycl_device)) float __spirv_ConvertBF16ToFINTEL(unsigned short);

namespace moe_xe {

inline float bias_of(const Arguments& args, int expert, int column) {
  if (column >= problem::n) return 0.0f;
  const int64 index = expert * args.bias_stride + column;
  if constexpr (problem::bias == Dtype::f32) return static_cast<const float*>(args.bias)[index];
  else if constexpr (problem::bias == Dtype::f16) return float(static_cast<const _Float16*>(args.bias)[index]);
  else return __spirv_ConvertBF16ToFINTEL(static_cast<const unsigned short*>(args.bias)[index]);
}

// The bits of a 16-bit output.
[[gnu::always_inline]] inline int16 round_to_output(float value) {
  if constexpr (problem::output == Dtype::f16) return __builtin_bit_cast(int16, _Float16(value));
  else return int16(__spirv_ConvertFToBF16INTEL(value));
}

}  // namespace moe_xe
