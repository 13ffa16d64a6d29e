// Values spread over the lanes of a GPU's sub-group: a variable holds one of them, and collectives join the lanes.
// cpu/lanes.hpp has the same for the elements of a CPU's vectors, so that one source serves both.
#pragma once
#include <moe_xe/scalar.hpp>
#include <moe_xe/gpu/team.hpp>

namespace moe_xe {

constexpr int lanes = Team::lanes;
constexpr int unrolled = 1024;   // of loops over arrays of lane values: all, so that the arrays are registers
using Floats = float;
using Ints = int;

inline Ints lane_numbers() { return Ints(__spirv_BuiltInSubgroupLocalInvocationId()); }

constexpr auto sub_group = __spv::Scope::Subgroup;
constexpr int reduce = int(__spv::GroupOperation::Reduce);
inline int max_of(Ints value) { return __spirv_GroupSMax(sub_group, reduce, value); }
inline int min_of(Ints value) { return __spirv_GroupSMin(sub_group, reduce, value); }
inline float sum_of(Floats value) { return __spirv_GroupFAdd(sub_group, reduce, value); }

// The next `lanes` elements as fp32, of which `count` are read; the others are zero.
template <Dtype dtype> Floats load_floats(const Element<dtype>* from, int count) {
  const Ints lane = lane_numbers();
  return lane < count ? widened<dtype>(from[lane]) : 0.f;
}

template <Dtype dtype> Floats gather_floats(const Element<dtype>* from, Ints index) {
  return widened<dtype>(from[index]);
}

template <class T, class Values> void store_lanes(T* to, Values values, int count) {
  const Ints lane = lane_numbers();
  if (lane < count) to[lane] = T(values);
}

template <Dtype dtype> Floats rounded_floats(Floats value) { return widened<dtype>(rounded<dtype>(value)); }

inline Floats exp_of(Floats value) { return __spirv_ocl_exp(value); }
inline Floats reciprocal_of(Floats value) { return __spirv_ocl_native_recip(value); }
inline Floats sqrt_of(Floats value) { return __spirv_ocl_sqrt(value); }

// A work-group for each token: across a loop over tokens, IGC would keep addresses that all tokens share in registers.
template <class Work> void for_tokens(const Team& team, int64 tokens, Work work) {
  if (team.group < tokens) work(team.group);
}

}  // namespace moe_xe
