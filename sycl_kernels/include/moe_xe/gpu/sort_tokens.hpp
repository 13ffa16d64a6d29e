// The token sort on a GPU: one work-group an expert, which finds its own rows and needs nothing from the others. Each
// sub-group has a range of the tokens, each lane one token at a time with all of its slots, so that lanes are in order
// of pairs. A first walk counts the pairs of lower experts and of this one, a second writes; it reads ids again, which somebody
// may have rewritten, and writes no more rows than were counted.
#pragma once
#include <moe_xe/routing/sorted_rows.hpp>
#include <moe_xe/gpu/team.hpp>

namespace moe_xe {

constexpr int max_sub_groups = Team::lanes;   // a lane for each when their counts are joined
inline sycl::ext::oneapi::experimental::work_group_static<int[2 * max_sub_groups]> sub_group_counts;

class ExpertSort {
 public:
  ExpertSort(const SortArguments& arguments, const Team& team)
      : args(arguments), team(team), expert(unsigned(team.group)), num_sub_groups(int(__spirv_BuiltInNumSubgroups())) {
    const int chunks = (args.num_tokens + lanes - 1) / lanes;
    const int chunks_each = (chunks + num_sub_groups - 1) / num_sub_groups;
    begin = lesser(team.sub_group * chunks_each * lanes, args.num_tokens);
    end = lesser(begin + chunks_each * lanes, args.num_tokens);
  }

  void run() const {
    const Counts mine = count();
    int* counts = *&sub_group_counts;
    if (team.lane() == 0) {
      counts[team.sub_group] = mine.lower;
      counts[max_sub_groups + team.sub_group] = mine.equal;
    }
    __spirv_ControlBarrier(int(__spv::Scope::Workgroup), int(__spv::Scope::Workgroup),
                           __spv::MemorySemanticsMask::SequentiallyConsistent | __spv::MemorySemanticsMask::WorkgroupMemory);
    const bool exists = team.lane() < num_sub_groups;
    const int lower = exists ? counts[team.lane()] : 0, equal = exists ? counts[max_sub_groups + team.lane()] : 0;
    const int total = sum(equal), row = first_routed_row(args) + sum(lower);
    const int worker = team.sub_group * lanes + team.lane();
    if (worker == 0) args.tokens_per_expert[problem::num_shared + expert] = total;
    if (mine.equal > 0) place(row + sum(team.lane() < team.sub_group ? equal : 0), mine.equal);
    if (int(expert) == args.num_experts - 1) clear_unused(args, row + total, worker, num_sub_groups * lanes);
  }

 private:
  static constexpr int lanes = Team::lanes;
  static constexpr int tokens_at_once = problem::top_k < 16 ? 16 / problem::top_k : 1;   // loads in flight
  using Slots = std::conditional_t<(problem::top_k > 32), unsigned long, unsigned>;    // a bit for each
  static_assert(problem::top_k <= 64);

  struct Counts {
    int lower, equal;   // pairs of experts before this one, and of this one
  };

  Counts count() const {
    int lower = 0, equal = 0;
#pragma unroll 1
    for (int first = begin + team.lane(); first < end; first += tokens_at_once * lanes) {
      unsigned experts[tokens_at_once][problem::top_k];
#pragma unroll
      for (int i = 0; i < tokens_at_once; ++i)
#pragma unroll
        for (int slot = 0; slot < problem::top_k; ++slot) experts[i][slot] = args.ids.expert_of(lesser(first + i * lanes, end - 1), slot);
#pragma unroll
      for (int i = 0; i < tokens_at_once; ++i)
#pragma unroll
        for (int slot = 0; slot < problem::top_k; ++slot) {
          const bool valid = first + i * lanes < end;
          lower += valid && experts[i][slot] < expert;
          equal += valid && experts[i][slot] == expert;
        }
    }
    return Counts{sum(lower), sum(equal)};
  }

  // This sub-group's rows, `rows` from `row` on.
  void place(int row, int rows) const {
    const int row_end = row + rows;
#pragma unroll 1
    for (int first = begin; first < end; first += lanes) {
      const int token = first + team.lane();
      Slots mine = token < end ? slots_of(token) : 0;
      const int count = __builtin_popcountll(mine);
      const int count_end = team.inclusive_scan(count);
      for (int mine_row = row + count_end - count; mine != 0 && mine_row < row_end; mine &= mine - 1, ++mine_row) {
        const int slot = __builtin_ctzll(mine);
        args.row_pairs[mine_row] = token * slots + slot;
        args.row_scales[mine_row] = routed_scale(args, token, slot);
      }
      row += team.broadcast(count_end, lanes - 1);
    }
  }

  // The slots with which a token goes to this expert.
  Slots slots_of(int token) const {
    Slots mine = 0;
#pragma unroll
    for (int slot = 0; slot < problem::top_k; ++slot) mine |= Slots(args.ids.expert_of(token, slot) == expert) << slot;
    return mine;
  }

  int sum(int value) const { return team.broadcast(team.inclusive_scan(value), lanes - 1); }
  static int lesser(int x, int y) { return x < y ? x : y; }

  const SortArguments& args;
  const Team& team;
  const unsigned expert;
  const int num_sub_groups;
  int begin, end;   // tokens of this sub-group
};

inline void sort_tokens(const SortArguments& args) {
  const Team team;
  const ExpertSort sort(args, team);
  sort.run();
  const int num_sub_groups = int(__spirv_BuiltInNumSubgroups());
  const int worker = team.group * num_sub_groups + team.sub_group, workers = team.num_groups * num_sub_groups;
  place_shared(args, worker * Team::lanes + team.lane(), workers * Team::lanes);
  zero_dropped_rows(args, worker, workers, team.lane(), Team::lanes);
}

}  // namespace moe_xe
