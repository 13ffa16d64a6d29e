// The token sort of few pairs, by one work-group. A pair's key rises with its expert, then with its own number, so that as
// many keys are smaller as there are rows before its row. Ids are read once.
#pragma once
#include <moe_xe/gpu/team.hpp>
#include <moe_xe/routing/sorted_rows.hpp>

namespace moe_xe {

constexpr unsigned keys_of_expert = config::most_pairs;   // a power of two
inline sycl::ext::oneapi::experimental::work_group_static<unsigned[config::most_pairs]> pair_keys;

inline void sort_few(const SortArguments& args, const Team& team) {
  constexpr unsigned dropped = ~0u;
  constexpr int lanes = Team::lanes;
  const int worker = team.sub_group * lanes + team.lane(), workers = team.num_sub_groups * lanes;
  const int pairs = args.num_tokens * problem::top_k;
  unsigned* keys = *&pair_keys;
  int32* counts = args.tokens_per_expert + problem::num_shared;
#pragma unroll 1
  for (int pair = worker; pair < (pairs + lanes - 1) / lanes * lanes; pair += workers) {
    const int token = pair / problem::top_k;
    const unsigned expert = pair < pairs ? args.ids.expert_of(token, pair - token * problem::top_k) : dropped;
    keys[pair] = expert < unsigned(args.num_experts) ? expert * keys_of_expert + pair : dropped;
  }
  for (int expert = worker; expert < args.num_experts; expert += workers) counts[expert] = 0;
  place_shared(args, worker, workers);
  team.barrier();
  int rows = 0;
#pragma unroll 1
  for (int first = 0; first < pairs; first += workers) {
    const int pair = first + worker;
    const unsigned key = pair < pairs ? keys[pair] : dropped;
    const unsigned of_expert = key / keys_of_expert * keys_of_expert, of_next = of_expert + keys_of_expert;
    int row = 0, begin = 0, end = 0;
    rows = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < pairs; chunk += lanes) {
      const unsigned keys_of_lanes = keys[chunk + team.lane()];
#pragma unroll
      for (int lane = 0; lane < lanes; ++lane) {
        const unsigned other = __spirv_SubgroupShuffleINTEL(keys_of_lanes, unsigned(lane));
        row += other < key;
        begin += other < of_expert;
        end += other < of_next;
        rows += other != dropped;
      }
    }
    if (key == dropped) continue;
    const int token = pair / problem::top_k, slot = pair - token * problem::top_k;
    args.row_pairs[first_routed_row(args) + row] = token * slots + slot;
    args.row_scales[first_routed_row(args) + row] = routed_scale(args, token, slot);
    if (row == begin) counts[key / keys_of_expert] = end - begin;
  }
  clear_unused(args, first_routed_row(args) + rows, worker, workers);
  zero_dropped_rows(args, team.sub_group, team.num_sub_groups, team.lane(), lanes);
}

}  // namespace moe_xe
