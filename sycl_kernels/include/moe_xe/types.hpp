// The vocabulary of the generated constants and the one set of arguments that every device's kernel takes.
#pragma once
#include <sycl/ext/oneapi/experimental/free_function_traits.hpp>
#include <sycl/ext/oneapi/free_function_queries.hpp>
#include <sycl/ext/oneapi/kernel_properties/properties.hpp>

namespace moe_xe {

using int16 = short;
using int32 = int;
using int64 = long;
static_assert(sizeof(int64) == 8);

enum class Dtype { bf16, f16, f32 };
enum class WeightLayout { enk, ekn };      // [E, N, K] (PyTorch's) or [E, K, N]
enum class RowsFormat { counts, ends };    // tokens per expert, or the cumulative end of each expert's rows
enum class Schedule { dynamic, static_stride };
enum class Isa { baseline, avx2, avx512, avx512_bf16 };   // CPU device: the widest instructions that may be used

constexpr int size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Base pointers, strides (in elements) and counts; N, K and everything else known when the kernel is compiled is in
// the generated namespaces `problem` and `config` (moe_xe/jit/source.py).
struct Arguments {
  const void* a;               // [a_rows, K]; row r of the sorted rows is a[r], or a[gather_indices[r]]
  const void* w;               // weights of all experts
  const void* bias;            // [E, N] or null
  void* d;                     // [total_rows, N]
  const void* rows;            // tokens per expert, or ends, [E]
  const int32* gather_indices; // [total_rows] or null
  int32* tile_counter;         // zero in stream order before the launch
  void* scratch;               // config::scratch_bytes for each work-group
  int64 total_rows;            // rows of d; no row beyond is read or written, whatever the counts say
  int64 a_rows;                // rows of a
  int64 a_stride;              // elements between rows of a
  int64 w_stride;              // elements between rows of one expert's weights
  int64 w_expert_stride;       // elements between experts' weights
  int64 bias_stride;           // elements between experts' biases
  int64 d_stride;              // elements between rows of d
  int32 num_experts;
};

// One tile of one expert: rows [row, row + rows) of the sorted rows, columns [column, column + config::tile_width).
struct Tile {
  int expert;
  int variant;        // index into config::heights
  int rows;           // valid rows, 1..heights[variant]
  int column;         // first column; columns beyond problem::n are not computed
  int64 row;          // first row
  int64 expert_end;   // one past the expert's last row
};

}  // namespace moe_xe
