// The token sort on the CPU device: a counting sort by the first work-group, the rest spread over all of them.
#pragma once
#include <moe_xe/routing/sorted_rows.hpp>
#include <moe_xe/cpu/team.hpp>

namespace moe_xe {

// Ids are read once: one that somebody rewrites meanwhile gives its pair to either expert, and no row outside. row_scales
// holds the pairs' experts until all rows are known. An expert's entry of tokens_per_expert is in turn its count, the row
// that its next token gets, and its count again.
inline void sort_routed(const SortArguments& args) {
  int32* entry = args.tokens_per_expert + problem::num_shared;
  const unsigned num_experts = unsigned(args.num_experts);
  const int first = first_routed_row(args);
  float* experts = args.row_scales + first;
  for (unsigned expert = 0; expert < num_experts; ++expert) entry[expert] = 0;
  for (int token = 0; token < args.num_tokens; ++token)
    for (int slot = 0; slot < problem::top_k; ++slot) {
      const unsigned expert = args.ids.expert_of(token, slot);
      experts[token * problem::top_k + slot] = __builtin_bit_cast(float, expert);
      if (expert < num_experts) ++entry[expert];
    }
  int row = first;
  for (unsigned expert = 0; expert < num_experts; ++expert) {
    const int count = entry[expert];
    entry[expert] = row;
    row += count;
  }
  for (int token = 0; token < args.num_tokens; ++token)
    for (int slot = 0; slot < problem::top_k; ++slot) {
      const unsigned expert = __builtin_bit_cast(unsigned, experts[token * problem::top_k + slot]);
      if (expert < num_experts) args.row_pairs[entry[expert]++] = token * slots + slot;
    }
  for (int sorted = first; sorted < row; ++sorted)
    args.row_scales[sorted] = routed_scale(args, args.row_pairs[sorted] / slots, args.row_pairs[sorted] % slots);
  int begin = first;
  for (unsigned expert = 0; expert < num_experts; ++expert) {
    const int end = entry[expert];
    entry[expert] = end - begin;
    begin = end;
  }
  clear_unused(args, row, 0, 1);
}

// All of it by one work-group.
inline void sort_few(const SortArguments& args, const Team&) {
  sort_routed(args);
  place_shared(args, 0, 1);
  zero_dropped_rows(args, 0, 1, 0, 1);
}

inline void sort_tokens(const SortArguments& args) {
  const Team team;
  if (team.group == 0) sort_routed(args);
  place_shared(args, team.group, team.num_groups);
  zero_dropped_rows(args, team.group, team.num_groups, 0, 1);
}

}  // namespace moe_xe
