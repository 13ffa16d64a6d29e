// Which local expert a token's slot goes to, as the sort and the combine both see it.
#pragma once
#include <moe_xe/types.hpp>
#include <type_traits>

namespace moe_xe {

// A token's slots: the routed experts, then the shared ones. Pair number = token * slots + slot.
constexpr int slots = problem::top_k + problem::num_shared;

struct ExpertIds {
  const problem::Id* ids;   // [tokens, top_k]
  int64 stride;             // elements between rows
  const int32* map;         // local expert of each global one, or null
  int32 map_size;

  // num_experts or more where the pair is dropped: negative numbers become large ones.
  unsigned expert_of(int64 token, int slot) const {
    using Unsigned = std::make_unsigned_t<problem::Id>;
    constexpr unsigned dropped = ~0u;
    const Unsigned id = Unsigned(ids[token * stride + slot]);
    if constexpr (problem::has_expert_map) {
      // always a load, of a valid address: a branch would keep the loads of several slots apart
      const bool inside = id < Unsigned(map_size);
      const unsigned local = unsigned(map[inside ? id : 0]);
      return inside ? local : dropped;
    } else {
      return id < dropped ? unsigned(id) : dropped;
    }
  }
};

}  // namespace moe_xe
