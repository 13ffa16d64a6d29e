// Step 1: a loop over experts. The host knows how many rows each expert has and launches this kernel once for each of them:
// d = a @ w for the expert's `rows` rows of a [rows, k] and its weights w [k, n]. One work-group computes one tile of d.
#include <sycl/ext/oneapi/experimental/free_function_traits.hpp>
#include <sycl/ext/oneapi/free_function_queries.hpp>
#include <sycl/ext/oneapi/kernel_properties/properties.hpp>

constexpr int tile_columns = 32;    // n is a multiple of it
using Vector = float __attribute__((ext_vector_type(tile_columns), aligned(64)));
constexpr int block_rows = 4;       // rows whose sums fit the registers
constexpr int tile_rows = 32;

// Rows [first, first + block_rows) of an expert times the tile's columns; all sums stay in registers over the whole of K.
// Rows past the expert's last one repeat it: they are computed and not stored.
inline void multiply(const float* a, const float* w, float* d, int first, int rows, int n, int k) {
  const float* row[block_rows];
  Vector sums[block_rows] = {};
  for (int i = 0; i < block_rows; ++i) row[i] = a + long(first + i < rows ? first + i : rows - 1) * k;
  for (int step = 0; step < k; ++step) {
    const Vector weights = *reinterpret_cast<const Vector*>(w + long(step) * n);
#pragma unroll
    for (int i = 0; i < block_rows; ++i) sums[i] += row[i][step] * weights;
  }
  for (int i = 0; i < block_rows && first + i < rows; ++i) *reinterpret_cast<Vector*>(d + long(first + i) * n) = sums[i];
}

extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::nd_range_kernel<1>))
SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::work_group_size<1>))
void loop_over_experts(const float* a, const float* w, float* d, int rows, int n, int k) {
  const auto item = sycl::ext::oneapi::this_work_item::get_nd_item<1>();
  const int tile = int(item.get_group(0)), row_tiles = (rows + tile_rows - 1) / tile_rows;
  const int first_row = tile % row_tiles * tile_rows, column = tile / row_tiles * tile_columns;    // neighbours share weights
  for (int row = first_row; row < first_row + tile_rows; row += block_rows) multiply(a, w + column, d + column, row, rows, n, k);
}
