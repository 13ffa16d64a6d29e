// Two dot-product kernels: K steps of 4 dpas each, and a chain of float multiply-adds.
#include <sycl/ext/oneapi/experimental/free_function_traits.hpp>
#include <sycl/ext/oneapi/free_function_queries.hpp>
#include <sycl/ext/oneapi/kernel_properties/properties.hpp>
namespace syclexp = sycl::ext::oneapi::experimental;
#define KERNEL(SIZE) extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((syclexp::nd_range_kernel<1>)) SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((syclexp::sub_group_size<SIZE>)) void
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));

KERNEL(16) dpas_kernel(const vec<short, 8>* a, const vec<int, 8>* b, vec<float, 8>* c, int steps) {
  const auto lane = sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_global_linear_id();
  vec<float, 8> sum[4] = {};
  for (int k = 0; k < steps; ++k) {
    const vec<short, 8> x = a[16 * k + lane];
    for (int i = 0; i < 4; ++i) {
      const vec<int, 8> y = b[16 * (4 * k + i) + lane];
#ifdef __SYCL_DEVICE_ONLY__
      asm("{\n.decl AA v_type=G type=UD num_elts=64 alias=<%1,0>\n.decl BB v_type=G type=UD num_elts=128 alias=<%2,0>\n"
          ".decl CC v_type=G type=F num_elts=128 alias=<%0,0>\ndpas.bf.bf.8.8 (M1,16) CC.0 CC.0 BB.0 AA(0,0)\n}\n" : "+rw"(sum[i]) : "rw"(x), "rw"(y));
#endif
    }
  }
  for (int i = 0; i < 4; ++i) c[16 * i + lane] = sum[i];
}

KERNEL(16) mad_kernel(const float* a, const float* b, float* c, int steps) {
  const auto lane = sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_global_linear_id();
  float sum = 0;
#pragma clang loop unroll(disable)
  for (int k = 0; k < steps; ++k) sum += a[k] * b[16 * k + lane];
  c[lane] = sum;
}
