// The vocabulary of the generated constants and the one set of arguments that every device's kernel takes.
#pragma once
#include <sycl/__spirv/spirv_vars.hpp>
#include <sycl/ext/oneapi/kernel_properties/properties.hpp>

namespace moe_xe {

using int16 = short;
using int32 = int;
using int64 = long;
static_assert(sizeof(int64) == 8);
using Record = int32 __attribute__((ext_vector_type(4)));   // of a tile: one load

enum class Dtype { bf16, f16, f32, i8 };   // i8: rows that are codes, of one scale each
enum class WeightLayout { enk, ekn };      // [E, N, K] (PyTorch's) or [E, K, N]
enum class RowsFormat { counts, ends, batched };   // tokens per expert, the cumulative end of each expert's rows, or counts where
                                                  // every expert has room for the same number of rows
enum class Schedule { dynamic, static_stride };
enum class Pairs { none, halves, interleaved };   // columns c and N/2 + c, or 2c and 2c + 1, are one gate and one up value
enum class Act { none, silu, gelu, gelu_tanh, relu2, swiglu_oai };
enum class Gathered { none, left, right };          // which operand of the weights' gradient
enum class RowScale { none, sums, outputs };       // a row's factor is applied before bias and activation, or after them
enum class Codes { none, int4, uint4, e2m1, int8, e4m3, e5m2 };   // of quantised weights: moe_xe/plan/formats.py
enum class ScaleType { f32, f16, bf16, e8m0, e4m3 };
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx, amx_fp16 };   // CPU device: the widest instructions that may be used

constexpr int size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::i8 ? 1 : 2; }

// Base pointers, strides (in elements) and counts; N, K and everything else known when the kernel is compiled is in
// the generated namespaces `problem` and `config` (moe_xe/jit/source.py). The first problem::shared groups of rows are
// shared experts', whose weights lie elsewhere; "expert" below counts them too.
struct Arguments {
  const void* a;               // [a_rows, K]; row r of the sorted rows is a[r], or a[row_indices[r] / problem::slots]
  const float* a_scales;       // [a_rows], of the codes in a; null if they are numbers
  const void* w;               // weights of the routed experts, or codes
  const void* shared_w;        // weights of the shared experts (gates, if the columns are pairs), or null
  const void* shared_up;       // their up values' weights, or null
  const void* scales;          // of the codes in w: [routed experts, groups of rows, groups of columns]; null if w has no codes
  const void* zeros;           // the same, or null
  const float* global_scales;  // [routed experts] or null
  const void* bias;            // [routed experts, N] or null
  void* d;                     // [d_rows, out_n]; row r of the sorted rows goes to d[r], or d[row_indices[r]]
  const void* rows;            // tokens per expert, or ends, [num_experts]; or a table of counts, [problem::ranks, num_experts]
  const int32* row_indices;    // [total_rows] or null
  const float* row_scales;     // [total_rows] or null
  int32* queue;                // a few words, zero in stream order before the launch
  void* scratch;               // config::scratch_bytes for each work-group, then the list of tiles (with sums, where K is split)
  int64 total_rows;            // no sorted row beyond is read or written, whatever the counts say
  int64 a_rows;                // rows of a
  int64 d_rows;                // rows of d
  int64 a_stride;              // elements between rows of a
  int64 w_stride;              // elements between rows of one expert's weights
  int64 w_expert_stride;       // elements between experts' weights
  int64 shared_stride;         // the same two for shared experts
  int64 shared_expert_stride;
  int64 bias_stride;           // elements between experts' biases
  int64 d_stride;              // elements between rows of d
  int64 rows_stride;           // elements between ranks' counts in the table
  int32 num_experts;           // routed and shared
};

// One tile of one expert: rows [row, row + rows) of the sorted rows, columns [column, column + config::tile_width)
// of the weights; where columns are pairs, the output's columns [column / 2, (column + config::tile_width) / 2).
struct Tile {
  int expert;
  int variant;        // index into config::heights
  int rows;           // valid rows, 1..heights[variant]
  int column;         // first column; columns beyond problem::n are not computed
  int64 row;          // first row
  int entry = 0;      // where K is split: its place in the list of tiles,
  int part = 0;       // and which part of K this is
};

}  // namespace moe_xe
