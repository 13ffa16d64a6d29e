// Which rows an expert has. With a table of counts they are several runs of sorted rows, one from each rank: rows come by rank, and
// within a rank by expert. Behind the work-groups' scratch lie an entry for each expert, then those of its runs, then the list of tiles.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

constexpr bool in_runs = problem::ranks > 1;

template <class Arguments> Record* experts_of(const Arguments& args, int num_groups) {
  return reinterpret_cast<Record*>(static_cast<char*>(args.scratch) + num_groups * config::scratch_bytes);
}

// One entry a rank: begin and end, then how many rows and how many row tiles the runs before it have.
template <class Arguments> Record* runs_of(const Arguments& args, int num_groups, int expert) {
  return experts_of(args, num_groups) + args.num_experts + int64(expert) * problem::ranks;
}

template <class Arguments> Record* list_of(const Arguments& args, int num_groups) {
  return in_runs ? runs_of(args, num_groups, args.num_experts) : experts_of(args, num_groups) + args.num_experts;
}

}  // namespace moe_xe
