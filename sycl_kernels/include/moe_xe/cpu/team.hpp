// The CPU device's team: one work-item a work-group, so every collective is the identity.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

struct Team {
  static constexpr int lanes = 1, sizes = 32, sub_group = 0, num_sub_groups = 1;
  int group = int(__spirv_BuiltInWorkgroupId(0));
  int num_groups = int(__spirv_BuiltInNumWorkgroups(0));

  int lane() const { return 0; }
  bool leads() const { return true; }
  template <class T> T inclusive_scan(T value) const { return value; }
  template <class T> T broadcast(T value, int) const { return value; }
  void barrier() const {}
  int64 scan(int64 value, int64& all) const { return all = value; }
  int* totals() { return size_totals; }
  const int* totals() const { return size_totals; }
  void add_shared(int* total, int value) const { *total += value; }

  bool is_first(int32* arrived) const { return add(arrived, 1) == 0; }
  bool is_last(int32* done, int of) const { return add(done, 1) == of - 1; }
  // Instructions instead of sycl::atomic_ref: an atomic makes the device's vectoriser see divergence and copy the
  // whole kernel for each lane (builds of minutes). x86 orders stores and loads.
  void publish(int32* word, int32 value) const { asm volatile("movl %0,(%1)" : : "r"(value), "r"(word) : "memory"); }
  int32 await(const int32* word) const {
    int32 value;
    do asm volatile("pause\n\tmovl (%1),%0" : "=r"(value) : "r"(word) : "memory");
    while (value == 0);
    return value;
  }
  void await_zero(const int32* word) const {
    int32 value;
    do asm volatile("pause\n\tmovl (%1),%0" : "=r"(value) : "r"(word) : "memory");
    while (value != 0);
  }
  void let_go() const { asm volatile("" : : : "memory"); }
  void take_over() const { asm volatile("" : : : "memory"); }
  int32 add(int32* word, int32 value) const {
    asm volatile("lock xaddl %0,(%2)" : "=r"(value) : "0"(value), "r"(word) : "memory");
    return value;
  }

  void hand_out(Record record) { handed = record; }
  Record receive() const { return handed; }

 private:
  Record handed = {};
  int size_totals[sizes] = {};
};

}  // namespace moe_xe
