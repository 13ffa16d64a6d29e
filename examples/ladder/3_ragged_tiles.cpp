// Step 3: ragged tiles. An expert with 3 rows does not pay for 32: its rows are cut into tiles of several heights, by the
// work-groups themselves, from the same array of rows per expert.
#include <sycl/ext/oneapi/experimental/free_function_traits.hpp>
#include <sycl/ext/oneapi/free_function_queries.hpp>
#include <sycl/ext/oneapi/kernel_properties/properties.hpp>

constexpr int tile_columns = 32;    // n is a multiple of it
using Vector = float __attribute__((ext_vector_type(tile_columns), aligned(64)));

// The rows are cut into tiles of 32 while they fill one, then of 8, and what is left into tiles of 2.
constexpr int heights[] = {32, 8, 2};

struct Cut {
  int tiles[3], first_row[3];       // row tiles of each height and where they begin
  int all = 0;                      // row tiles

  explicit Cut(int rows) {
    int row = 0;
    for (int i = 0; i < 3; ++i) {
      tiles[i] = (rows - row + (i == 2 ? heights[i] - 1 : 0)) / heights[i];
      first_row[i] = row;
      row += tiles[i] * heights[i];
      all += tiles[i];
    }
  }
};

// block_rows is a template's number now: each height has code of its own, with as many sums.
// Rows [first, first + block_rows) of an expert times the tile's columns; all sums stay in registers over the whole of K.
// Rows past the expert's last one repeat it: they are computed and not stored.
template <int block_rows> void multiply(const float* a, const float* w, float* d, int first, int rows, int n, int k) {
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

template <int block_rows> void run_tile(const float* a, const float* w, float* d, int first_row, int height, int rows, int n,
                                        int k) {
  for (int row = first_row; row < first_row + height; row += block_rows) multiply<block_rows>(a, w, d, row, rows, n, k);
}

extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::nd_range_kernel<1>))
SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::work_group_size<1>))
void ragged_tiles(const float* a, const float* w, float* d, const int* rows_per_expert, int experts, int n, int k) {
  const auto item = sycl::ext::oneapi::this_work_item::get_nd_item<1>();
  const int groups = int(item.get_group_range(0)), column_tiles = n / tile_columns;
  int tile = int(item.get_group(0)), first_tile = 0;    // the number wanted, and the number of the expert's first tile
  for (int expert = 0; expert < experts; ++expert) {
    const int rows = rows_per_expert[expert];
    const Cut cut(rows);
    const int tiles = cut.all * column_tiles;
    for (; tile < first_tile + tiles; tile += groups) {
      int row_tile = (tile - first_tile) % cut.all, height = 0;    // neighbours share weights
      for (; row_tile >= cut.tiles[height]; ++height) row_tile -= cut.tiles[height];
      const int row = cut.first_row[height] + row_tile * heights[height];
      const int column = (tile - first_tile) / cut.all * tile_columns;
      if (heights[height] == 2) run_tile<2>(a, w + column, d + column, row, 2, rows, n, k);
      else run_tile<4>(a, w + column, d + column, row, heights[height], rows, n, k);
    }
    first_tile += tiles;
    a += long(rows) * k;
    d += long(rows) * n;
    w += long(k) * n;
  }
}
