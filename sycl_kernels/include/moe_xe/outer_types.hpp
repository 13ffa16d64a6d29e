// The gradient of the weights: d[e] = left[rows of e]^T @ right[rows of e], a product over each expert's rows.
#pragma once
#include <moe_xe/queue/runs.hpp>

namespace moe_xe {

// Base pointers, strides (in elements) and counts. problem::p, problem::q: columns of left and of right, rows and columns
// of d. The rows of an expert may be shared out to config::splits tiles, each with a d of its own (fp32) to be summed.
struct OuterArguments {
  const void* left;            // [left_rows, P]; row r of the sorted rows is left[r], or left[row_indices[r] / problem::slots]
  const void* right;           // [right_rows, Q], likewise
  void* d;                     // [num_experts, P, Q]
  const void* rows;            // tokens per expert, ends, or a table of counts, as in Arguments
  const int32* row_indices;    // [total_rows] or null: of the operand that is gathered
  const int64* row_addresses;  // [total_rows] or null: of that operand's rows, which a loop over rows had better not compute
  int32* queue;                // a few words, zero in stream order before the launch
  void* scratch;               // config::scratch_bytes for each work-group, then the list of tiles
  int64 total_rows;            // no sorted row beyond is read, whatever the counts say
  int64 left_rows, right_rows;
  int64 left_stride, right_stride;
  int64 d_stride;              // elements between rows of one expert's d
  int64 d_expert_stride;
  int64 d_split_stride;
  int64 rows_stride;
  int32 num_experts;
};

// One tile of one expert's d: rows [row, row + config::tile_rows), columns [column, column + config::tile_columns), the
// product over the sorted rows [begin, end), of which there may be none: then it is zero. Where an expert's rows are several runs,
// rows are counted within all of them.
struct OuterTile {
  int expert;
  int split;
  int row;
  int column;
  int64 begin;
  int64 end;
  const Record* runs = nullptr;
};

// The sorted row of one of a tile's rows: of the last run that does not begin behind it, as those without rows have others behind them.
inline int64 sorted_row_of(const OuterTile& tile, int64 row) {
  if constexpr (!in_runs) return row;
  int64 sorted_row = 0;
#pragma unroll 1
  for (int rank = 0; rank < problem::ranks; ++rank) {
    const Record run = tile.runs[rank];
    if (row >= run.z) sorted_row = row - run.z + run.x;
  }
  return sorted_row;
}

// The source of a sorted row in the gathered operand. Whatever an index says, a row of it is read.
inline int64 outer_source_row(const OuterArguments& args, int64 sorted_row) {
  const int64 row = unsigned(args.row_indices[sorted_row]) / unsigned(problem::slots);
  const int64 rows = problem::gathered == Gathered::left ? args.left_rows : args.right_rows;
  return row < rows ? row : rows - 1;
}

}  // namespace moe_xe
