// What the CPU's multiply-add units can do at best: independent chains in registers, no memory.
#include <moe_xe/types.hpp>

template <int width> using Floats = float __attribute__((ext_vector_type(width)));

extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::nd_range_kernel<1>))
SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::sub_group_size<4>)) void fma_peak(float* sums, int rounds) {
  const int group = int(__spirv_BuiltInWorkgroupId(0));
  Floats<MOE_XE_WIDTH> chain[MOE_XE_CHAINS];
  const Floats<MOE_XE_WIDTH> factor = sums[group], term = sums[group] + 1.f;
#pragma unroll
  for (int i = 0; i < MOE_XE_CHAINS; ++i) chain[i] = float(i);
#pragma unroll 1
  for (int round = 0; round < rounds; ++round)
#pragma unroll
    for (int i = 0; i < MOE_XE_CHAINS; ++i) chain[i] = __builtin_elementwise_fma(chain[i], factor, term);
  for (int i = 0; i < MOE_XE_CHAINS; ++i)
    for (int lane = 0; lane < MOE_XE_WIDTH; ++lane) sums[group] += chain[i][lane];
}
