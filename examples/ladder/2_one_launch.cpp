// Step 2: one launch for all experts. The rows per expert are an array on the device, and each work-group finds its tiles by itself:
// it walks the experts and takes the tiles number group, group + groups, ... of all of them. The host waits for nothing.
// a [sum of rows, k] is sorted by expert, w is [experts, k, n].
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
void one_launch(const float* a, const float* w, float* d, const int* rows_per_expert, int experts, int n, int k) {
  const auto item = sycl::ext::oneapi::this_work_item::get_nd_item<1>();
  const int groups = int(item.get_group_range(0)), column_tiles = n / tile_columns;
  int tile = int(item.get_group(0)), first_tile = 0;    // the number wanted, and the number of the expert's first tile
  for (int expert = 0; expert < experts; ++expert) {
    const int rows = rows_per_expert[expert];
    const int row_tiles = (rows + tile_rows - 1) / tile_rows, tiles = row_tiles * column_tiles;
    for (; tile < first_tile + tiles; tile += groups) {
      const int local = tile - first_tile;
      const int first_row = local % row_tiles * tile_rows, column = local / row_tiles * tile_columns;    // neighbours share weights
      for (int row = first_row; row < first_row + tile_rows; row += block_rows) multiply(a, w + column, d + column, row, rows, n, k);
    }
    first_tile += tiles;
    a += long(rows) * k;
    d += long(rows) * n;
    w += long(k) * n;
  }
}
