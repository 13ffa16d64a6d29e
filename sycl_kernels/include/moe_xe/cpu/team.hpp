// The CPU device's team: one work-item a work-group, so every collective is the identity.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

struct Team {
  static constexpr int lanes = 1;
  int group = int(sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_group(0));
  int num_groups = int(sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_group_range(0));

  int lane() const { return 0; }
  unsigned any_bits(unsigned bits) const { return bits; }
  int first_lane_where(bool condition) const { return condition ? 0 : 1; }
  template <class T> T inclusive_scan(T value) const { return value; }
  template <class T> T broadcast(T value, int) const { return value; }

  // Instructions instead of sycl::atomic_ref: an atomic makes the device's vectoriser see divergence and copy the
  // whole kernel for each lane (builds of minutes).
  void request_tile(int32* counter) {
    int one = 1;
    asm volatile("lock xaddl %0,(%2)" : "=r"(requested) : "0"(one), "r"(counter) : "memory");
  }
  int receive_tile() const { return requested; }

 private:
  int requested = 0;
};

}  // namespace moe_xe
