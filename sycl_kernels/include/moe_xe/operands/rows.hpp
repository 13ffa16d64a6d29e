// Where a tile's rows come from and go to: in sorted order, gathered or scattered.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

// The row of `a` of a sorted row. Whatever an index says, a row of `a` is read.
inline int64 source_row(const Arguments& args, int64 sorted_row) {
  if constexpr (!problem::gathered) return sorted_row;
  const int64 row = unsigned(args.row_indices[sorted_row]) / unsigned(problem::slots);
  return row < args.a_rows ? row : args.a_rows - 1;
}

// The row of `d` of a sorted row; -1 for an index outside, which is not written.
inline int64 target_row(const Arguments& args, int64 sorted_row) {
  if constexpr (!problem::scattered) return sorted_row;
  const int64 row = unsigned(args.row_indices[sorted_row]);
  return row < args.d_rows ? row : -1;
}

inline float scale_of(const Arguments& args, int64 sorted_row) {
  if constexpr (problem::row_scale == RowScale::none) return 1.0f;
  else return args.row_scales[sorted_row];
}

}  // namespace moe_xe
