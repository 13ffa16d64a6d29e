// Where a tile's rows come from and go to: in sorted order, gathered or scattered.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

// Indices are 32 bits, and so is what is computed from them: a count beyond allows them all.
inline unsigned index_limit(int64 count) { return count < 0xFFFFFFFF ? unsigned(count) : 0xFFFFFFFFu; }

// The row of `a` of a sorted row. Whatever an index says, a row of `a` is read.
inline int64 source_row(const Arguments& args, int64 sorted_row) {
  if constexpr (!problem::gathered) return sorted_row;
  const unsigned row = unsigned(args.row_indices[sorted_row]) / unsigned(problem::slots), last = index_limit(args.a_rows - 1);
  return row < last ? row : last;
}

// The row of `d` of a sorted row; -1 for an index outside, which is not written.
inline int64 target_row(const Arguments& args, int64 sorted_row) {
  if constexpr (!problem::scattered) return sorted_row;
  const unsigned row = unsigned(args.row_indices[sorted_row]);
  return row < index_limit(args.d_rows) ? int64(row) : -1;
}

// Of the codes in a sorted row of `a`; 1 where it has numbers.
inline float a_scale_of(const Arguments& args, int64 sorted_row) {
  if constexpr (problem::input == Dtype::i8) return args.a_scales[source_row(args, sorted_row)];
  else return 1.0f;
}

inline float scale_of(const Arguments& args, int64 sorted_row) {
  if constexpr (problem::row_scale == RowScale::none) return 1.0f;
  else return args.row_scales[sorted_row];
}

}  // namespace moe_xe
