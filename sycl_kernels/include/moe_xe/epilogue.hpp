// What happens to a tile's fp32 sums on Xe before they are stored: bias, then one rounding.
#pragma once
#include <moe_xe/atoms_xe.hpp>
#include <moe_xe/scalar.hpp>

extern __attribute__((sycl_device)) unsigned short __spirv_ConvertFToBF16INTEL(float);

namespace moe_xe {

inline float bias_of(const Arguments& args, int expert, int column) {
  if (column >= problem::n) return 0.0f;
  return widened<problem::bias>(static_cast<const Element<problem::bias>*>(args.bias)[expert * args.bias_stride + column]);
}

// The bits of a 16-bit output, by the machine's own conversion.
[[gnu::always_inline]] inline int16 round_to_output(float value) {
  if constexpr (problem::output == Dtype::f16) return __builtin_bit_cast(int16, _Float16(value));
  else return int16(__spirv_ConvertFToBF16INTEL(value));
}

}  // namespace moe_xe
