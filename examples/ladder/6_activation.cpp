// Step 6: the activation in the epilogue. The first GEMM of the block makes gate and up values, of which only silu(gate) * up is
// wanted. Applied to the sums before they are stored, it costs nothing, and [rows, n] is never written: half of it is.
#include <sycl/ext/oneapi/experimental/free_function_traits.hpp>
#include <sycl/ext/oneapi/free_function_queries.hpp>
#include <sycl/ext/oneapi/kernel_properties/properties.hpp>
#include <sycl/atomic_ref.hpp>

constexpr int tile_columns = 32;    // of the output: as many gate and up columns of the weights; n / 2 is a multiple of it
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

// silu(gate) * up = gate / (1 + exp(-gate)) * up
inline Vector activated(Vector gate, Vector up) {
  return gate / (1.f + __builtin_elementwise_exp(-gate)) * up;
}

// block_rows rows times a vector of gate columns and the vector of up columns that belongs to it, n / 2 further on: the activation
// needs both sums of an element in the same registers. What is stored is [rows, n / 2].
template <int block_rows> void multiply(const float* x, const int* tokens, const float* w, float* d, int first, int rows,
                                        int n, int k) {
  const float* row[block_rows];
  Vector gates[block_rows] = {}, ups[block_rows] = {};
  for (int i = 0; i < block_rows; ++i) row[i] = x + long(tokens[first + i < rows ? first + i : rows - 1]) * k;
  for (int step = 0; step < k; ++step) {
    const Vector gate = *reinterpret_cast<const Vector*>(w + long(step) * n);
    const Vector up = *reinterpret_cast<const Vector*>(w + long(step) * n + n / 2);
#pragma unroll
    for (int i = 0; i < block_rows; ++i) {
      gates[i] += row[i][step] * gate;
      ups[i] += row[i][step] * up;
    }
  }
  for (int i = 0; i < block_rows && first + i < rows; ++i)
    *reinterpret_cast<Vector*>(d + long(first + i) * (n / 2)) = activated(gates[i], ups[i]);
}

template <int block_rows> void run_tile(const float* x, const int* tokens, const float* w, float* d, int first_row, int height,
                                        int rows, int n, int k) {
  for (int row = first_row; row < first_row + height; row += block_rows) multiply<block_rows>(x, tokens, w, d, row, rows, n, k);
}

// The next number that nobody has taken; relaxed, as nothing but the number itself is shared.
inline int take_one(int* counter) {
  return sycl::atomic_ref<int, sycl::memory_order::relaxed, sycl::memory_scope::device>(*counter).fetch_add(1);
}

extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::nd_range_kernel<1>))
SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::work_group_size<1>))
void activation(const float* x, const int* tokens, const float* w, float* d, const int* rows_per_expert, int* counter,
                int experts, int n, int k) {
  const int column_tiles = n / 2 / tile_columns;
  int tile = take_one(counter), first_tile = 0;    // the number wanted, and the number of the expert's first tile
  for (int expert = 0; expert < experts; ++expert) {
    const int rows = rows_per_expert[expert];
    const Cut cut(rows);
    const int tiles = cut.all * column_tiles;
    for (; tile < first_tile + tiles; tile = take_one(counter)) {
      int row_tile = (tile - first_tile) % cut.all, height = 0;    // neighbours share weights
      for (; row_tile >= cut.tiles[height]; ++height) row_tile -= cut.tiles[height];
      const int row = cut.first_row[height] + row_tile * heights[height];
      const int column = (tile - first_tile) / cut.all * tile_columns;
      if (heights[height] == 2) run_tile<2>(x, tokens, w + column, d + column, row, 2, rows, n, k);
      else run_tile<4>(x, tokens, w + column, d + column, row, heights[height], rows, n, k);
    }
    first_tile += tiles;
    tokens += rows;
    d += long(rows) * (n / 2);
    w += long(k) * n;
  }
}
