// A GPU's team: the lanes of one sub-group walk the queue together; every sub-group of the work-group finds the same
// tile, and one atomic a tile serves them all.
#pragma once
#include <moe_xe/types.hpp>
#include <sycl/ext/oneapi/work_group_static.hpp>

namespace moe_xe {

inline sycl::ext::oneapi::experimental::work_group_static<int[2]> tile_slots;

struct Team {
  static constexpr int lanes = 16;
  int group = int(__spirv_BuiltInWorkgroupId(0));
  int num_groups = int(__spirv_BuiltInNumWorkgroups(0));
  int sub_group = uniform(int(__spirv_BuiltInSubgroupId()));

  int lane() const { return int(__spirv_BuiltInSubgroupLocalInvocationId()); }
  unsigned any_bits(unsigned bits) const {
#pragma unroll
    for (int step = 1; step < lanes; step *= 2) bits |= __spirv_SubgroupShuffleXorINTEL(bits, unsigned(step));
    return bits;
  }
  int first_lane_where(bool condition) const {
    const unsigned first = condition ? unsigned(lane()) : unsigned(lanes);
    return int(__spirv_GroupUMin(__spv::Scope::Subgroup, int(__spv::GroupOperation::Reduce), first));
  }
  template <class T> T inclusive_scan(T value) const {
    return __spirv_GroupIAdd(__spv::Scope::Subgroup, int(__spv::GroupOperation::InclusiveScan), value);
  }
  template <class T> T broadcast(T value, int from) const {
    return __spirv_GroupBroadcast(__spv::Scope::Subgroup, value, unsigned(from));
  }
  static int uniform(int value) { return __spirv_GroupBroadcast(__spv::Scope::Subgroup, value, 0u); }

  // Asked for before a tile's main loop and received after it, so that the atomic's latency is hidden. Two slots used
  // in turn need one barrier a tile: a slot is written again only after everybody has passed the next barrier.
  void request_tile(int32* counter) {
    if (sub_group == 0 && lane() == 0) {
      auto* global = (__attribute__((opencl_global)) int32*)counter;
      slots()[turn] = __spirv_AtomicIAdd(global, int(__spv::Scope::Device), int(__spv::MemorySemanticsMask::None), 1);
    }
  }
  int receive_tile() {
    __spirv_ControlBarrier(int(__spv::Scope::Workgroup), int(__spv::Scope::Workgroup),
                           __spv::MemorySemanticsMask::SequentiallyConsistent | __spv::MemorySemanticsMask::WorkgroupMemory);
    const int number = uniform(slots()[turn]);
    turn ^= 1;
    return number;
  }

 private:
  static int* slots() { return *&tile_slots; }
  int turn = 0;
};

}  // namespace moe_xe
