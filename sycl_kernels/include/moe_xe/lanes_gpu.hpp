// Values spread over the lanes of a GPU's sub-group: a variable holds one of them, and collectives join the lanes.
// lanes_cpu.hpp has the same for the elements of a CPU's vectors, so that one source serves both.
#pragma once
#include <moe_xe/scalar.hpp>
#include <moe_xe/team_gpu.hpp>

namespace moe_xe {

constexpr int lanes = Team::lanes;
constexpr int unrolled = 1024;   // loops over arrays of lane values: entirely, so that the arrays are registers
using Floats = float;
using Ints = int;

inline Ints lane_numbers() { return Ints(__spirv_BuiltInSubgroupLocalInvocationId()); }

inline int max_of(Ints value) { return __spirv_GroupSMax(__spv::Scope::Subgroup, int(__spv::GroupOperation::Reduce), value); }
inline int min_of(Ints value) { return __spirv_GroupSMin(__spv::Scope::Subgroup, int(__spv::GroupOperation::Reduce), value); }
inline float sum_of(Floats value) { return __spirv_GroupFAdd(__spv::Scope::Subgroup, int(__spv::GroupOperation::Reduce), value); }

// The pointer, in a way that keeps addresses derived from it inside the loop: those of an array would fill the registers.
template <class T> const T* in_loop(const T* pointer) {
  return reinterpret_cast<const T*>(__spirv_GroupBroadcast(__spv::Scope::Subgroup, reinterpret_cast<unsigned long>(pointer), 0u));
}

// The next `lanes` elements as fp32, of which `count` are read; the others are zero.
template <Dtype dtype> Floats load_floats(const Element<dtype>* from, int count) {
  const Ints lane = lane_numbers();
  return lane < count ? widened<dtype>(from[lane]) : 0.f;
}

template <Dtype dtype> Floats gather_floats(const Element<dtype>* from, Ints index) { return widened<dtype>(from[index]); }

template <class T, class Values> void store_lanes(T* to, Values values, int count) {
  const Ints lane = lane_numbers();
  if (lane < count) to[lane] = T(values);
}

inline Floats exp_of(Floats value) { return __spirv_ocl_exp(value); }
inline Floats reciprocal_of(Floats value) { return __spirv_ocl_native_recip(value); }
inline Floats sqrt_of(Floats value) { return __spirv_ocl_sqrt(value); }

}  // namespace moe_xe
