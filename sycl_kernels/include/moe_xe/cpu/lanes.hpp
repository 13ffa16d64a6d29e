// The elements of a CPU's vectors as lanes: what gpu/lanes.hpp has for a sub-group.
#pragma once
#include <moe_xe/cpu/team.hpp>
#include <moe_xe/cpu/vector.hpp>

namespace moe_xe {

constexpr int lanes = width;
constexpr int unrolled = 4;   // of loops over arrays of vectors
using Ints = Vector<int>;

inline Ints lane_numbers() {
  Ints numbers;
#pragma unroll
  for (int lane = 0; lane < lanes; ++lane) numbers[lane] = lane;
  return numbers;
}

// Lane i of the result is lane i + distance, around the end.
template <int distance> struct Rotation {
  static constexpr int of(int i) { return (i + distance) % lanes; }
};
template <int distance = lanes / 2, class Pick> int reduced(Ints value, Pick pick) {
  if constexpr (distance == 0) return value[0];
  else return reduced<distance / 2>(pick(value, shuffle<Rotation<distance>>(value, value)), pick);
}
inline int max_of(Ints value) { return reduced(value, [](Ints x, Ints y) { return x > y ? x : y; }); }
inline int min_of(Ints value) { return reduced(value, [](Ints x, Ints y) { return x < y ? x : y; }); }

template <Dtype dtype> Floats gather_floats(const Element<dtype>* from, Ints index) {
  Floats values;
#pragma unroll
  for (int lane = 0; lane < lanes; ++lane) values[lane] = widened<dtype>(from[index[lane]]);
  return values;
}

template <class T, class Values> void store_lanes(T* to, Values values, int count) {
#pragma unroll
  for (int lane = 0; lane < lanes; ++lane)
    if (lane < count) to[lane] = T(values[lane]);
}

template <Dtype dtype> Floats rounded_floats(Floats value) {
  Element<dtype> elements[lanes];
  store_rounded<dtype>(elements, value);
  return load_floats<dtype>(elements);
}

inline Floats exp_of(Floats value) { return __spirv_ocl_exp(value); }
inline Floats reciprocal_of(Floats value) { return 1.f / value; }
inline Floats sqrt_of(Floats value) { return __spirv_ocl_sqrt(value); }

template <class Work> void for_tokens(const Team& team, int64 tokens, Work work) {
  for (int64 token = team.group; token < tokens; token += team.num_groups) work(token);
}

}  // namespace moe_xe
