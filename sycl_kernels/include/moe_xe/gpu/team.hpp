// A GPU's team: the lanes of one work-group, and those of one sub-group, which stay together.
#pragma once
#include <moe_xe/types.hpp>
#include <sycl/__spirv/spirv_ops.hpp>
#include <sycl/ext/oneapi/work_group_static.hpp>

namespace moe_xe {

struct TeamMemory {
  Record handed[2];
  int64 sums[64];    // of each sub-group
  int totals[32];
  int arrived;
};
inline sycl::ext::oneapi::experimental::work_group_static<TeamMemory> team_memory;

struct Team {
  static constexpr int lanes = 16, sizes = sizeof(TeamMemory::totals) / sizeof(int);
  int group = int(__spirv_BuiltInWorkgroupId(0));
  int num_groups = int(__spirv_BuiltInNumWorkgroups(0));
  int sub_group = uniform(int(__spirv_BuiltInSubgroupId()));
  int num_sub_groups = int(__spirv_BuiltInNumSubgroups());

  int lane() const { return int(__spirv_BuiltInSubgroupLocalInvocationId()); }
  bool leads() const { return sub_group == 0 && lane() == 0; }    // one lane of the work-group
  template <class T> T inclusive_scan(T value) const {
    return __spirv_GroupIAdd(__spv::Scope::Subgroup, int(__spv::GroupOperation::InclusiveScan), value);
  }
  template <class T> T broadcast(T value, int from) const {
    return __spirv_GroupBroadcast(__spv::Scope::Subgroup, value, unsigned(from));
  }
  static int uniform(int value) { return __spirv_GroupBroadcast(__spv::Scope::Subgroup, value, 0u); }

  // What the work-group's lanes wrote before, to local or global memory, all of them see behind it.
  void barrier() const {
    __spirv_ControlBarrier(int(__spv::Scope::Workgroup), int(__spv::Scope::Workgroup), all_memory);
  }

  // Inclusive, over the lanes of the whole work-group; `all` becomes the sum of all.
  int64 scan(int64 value, int64& all) const {
    int64* sums = memory().sums;
    const int64 end = inclusive_scan(value);
    if (lane() == lanes - 1) sums[sub_group] = end;
    barrier();
    int64 before = 0, sum = 0;
    for (int i = lane(); i < num_sub_groups; i += lanes) {
      sum += sums[i];
      before += i < sub_group ? sums[i] : 0;
    }
    barrier();
    all = reduced(sum);
    return end + reduced(before);
  }

  int* totals() const { return memory().totals; }   // for anybody
  void add_shared(int* total, int value) const {
    auto* local = (__attribute__((opencl_local)) int32*)total;
    __spirv_AtomicIAdd(local, int(__spv::Scope::Workgroup), int(__spv::MemorySemanticsMask::None), value);
  }

  // Whether this work-group is the first one to ask.
  bool is_first(int32* arrived) const {
    if (leads()) memory().arrived = add(arrived, 1);
    barrier();
    return uniform(memory().arrived) == 0;
  }
  // Whether this work-group is the last of so many to count itself in; then it sees what all of them wrote before.
  bool is_last(int32* done, int of) const {
    let_go();
    barrier();
    if (leads()) memory().arrived = add(done, 1);
    barrier();
    take_over();
    return uniform(memory().arrived) == of - 1;
  }
  // What the work-group wrote before is seen by a lane of any other one behind its await.
  void publish(int32* word, int32 value) const {
    __spirv_ControlBarrier(int(__spv::Scope::Workgroup), int(__spv::Scope::Device), all_memory);
    if (leads()) __spirv_AtomicStore(global(word), int(__spv::Scope::Device), release, value);
  }
  int32 await(int32* word) const {
    int32 value;
    do value = __spirv_AtomicLoad(global(word), int(__spv::Scope::Device), acquire);
    while (value == 0);
    return value;
  }
  void await_zero(int32* word) const {
    while (__spirv_AtomicLoad(global(word), int(__spv::Scope::Device), acquire) != 0) {}
  }
  // What a sub-group wrote is seen by other work-groups that its lead tells so behind the next barrier.
  void let_go() const { __spirv_MemoryBarrier(int(__spv::Scope::Device), release); }
  // A sub-group sees what its lead has awaited, behind a barrier: this core's caches may hold lines from before.
  void take_over() const { __spirv_MemoryBarrier(int(__spv::Scope::Device), acquire); }
  int32 add(int32* word, int32 value) const {
    return __spirv_AtomicIAdd(global(word), int(__spv::Scope::Device), int(__spv::MemorySemanticsMask::None), value);
  }

  // From the lane that leads to all: two slots used in turn need one barrier a record, as a slot is written again only
  // after everybody has passed the next barrier.
  void hand_out(Record record) const { memory().handed[turn] = record; }
  Record receive() {
    __spirv_ControlBarrier(int(__spv::Scope::Workgroup), int(__spv::Scope::Workgroup), local_memory);
    const Record record = memory().handed[turn];
    turn ^= 1;
    return Record{uniform(record.x), uniform(record.y), uniform(record.z), uniform(record.w)};
  }

 private:
  static constexpr int local_memory = __spv::MemorySemanticsMask::SequentiallyConsistent | __spv::MemorySemanticsMask::WorkgroupMemory;
  static constexpr int all_memory = local_memory | __spv::MemorySemanticsMask::CrossWorkgroupMemory;
  static constexpr int release = __spv::MemorySemanticsMask::Release | __spv::MemorySemanticsMask::CrossWorkgroupMemory;
  static constexpr int acquire = __spv::MemorySemanticsMask::Acquire | __spv::MemorySemanticsMask::CrossWorkgroupMemory;
  static TeamMemory& memory() { return *&team_memory; }
  static __attribute__((opencl_global)) int32* global(int32* word) { return (__attribute__((opencl_global)) int32*)word; }
  int64 reduced(int64 value) const { return broadcast(inclusive_scan(value), lanes - 1); }
  int turn = 0;
};

}  // namespace moe_xe
