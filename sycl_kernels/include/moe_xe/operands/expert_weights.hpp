// Where one expert's weights and biases lie: routed experts side by side, shared experts in tensors of their own.
#pragma once
#include <moe_xe/scalar.hpp>

namespace moe_xe {

constexpr bool paired = problem::pairs != Pairs::none;
constexpr int64 out_n = paired ? problem::n / 2 : problem::n;
// Pairs that are neighbours in a row of memory, so that vectors hold both of each.
constexpr bool woven = problem::pairs == Pairs::interleaved && problem::weights == WeightLayout::ekn;

struct ExpertWeights {
  using Input = Element<problem::input>;
  const Input* gate;    // output column 0's weights; of plain columns too
  const Input* up;      // its pair's, if columns are pairs
  int64 row_stride;     // elements between rows in memory

  // Elements from one output column's weights to the next one's.
  int64 column_step() const {
    if constexpr (problem::weights == WeightLayout::ekn) return woven ? 2 : 1;
    return problem::pairs == Pairs::interleaved ? 2 * row_stride : row_stride;
  }
};

inline ExpertWeights weights_of(const Arguments& args, int expert) {
  using Input = Element<problem::input>;
  if constexpr (problem::shared > 0)
    if (expert < problem::shared) {
      const int64 offset = expert * args.shared_expert_stride;
      return {static_cast<const Input*>(args.shared_w) + offset, static_cast<const Input*>(args.shared_up) + offset, args.shared_stride};
    }
  const Input* gate = static_cast<const Input*>(args.w) + (expert - problem::shared) * args.w_expert_stride;
  const int64 distance = problem::pairs == Pairs::halves ? out_n : 1;   // of a pair, in columns
  return {gate, gate + distance * (problem::weights == WeightLayout::enk ? args.w_stride : 1), args.w_stride};
}

// The expert's biases; null for shared experts, which have none.
inline const Element<problem::bias>* biases_of(const Arguments& args, int expert) {
  if (expert < problem::shared) return nullptr;
  return static_cast<const Element<problem::bias>*>(args.bias) + (expert - problem::shared) * args.bias_stride;
}

// The weight column (and bias) of an output column; `part` 1 is its pair's up value.
constexpr int64 weight_column(int64 column, int part) {
  if constexpr (problem::pairs == Pairs::halves) return column + part * out_n;
  else if constexpr (problem::pairs == Pairs::interleaved) return 2 * column + part;
  else return column;
}

}  // namespace moe_xe
