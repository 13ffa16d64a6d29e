// out = a + scale * b, with two arguments that the kernel does not use.
#include <sycl/ext/oneapi/experimental/free_function_traits.hpp>
#include <sycl/ext/oneapi/free_function_queries.hpp>
#include <sycl/ext/oneapi/kernel_properties/properties.hpp>

namespace syclex = sycl::ext::oneapi::experimental;

extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((syclex::nd_range_kernel<1>))
void vector_add(const float*, const float* a, const float* b, float* out, int n, long long, float scale) {
    const auto i = sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_global_linear_id();
    if (i < static_cast<unsigned>(n)) out[i] = a[i] + scale * b[i];
}
