// A row on a GPU: a work-group has it. A lane takes problem::columns consecutive columns at a time, as one vector.
#pragma once
#include <moe_xe/scalar.hpp>
#include <moe_xe/gpu/team.hpp>

namespace moe_xe {

constexpr int width = problem::columns;

// A single column is no vector: the GPU's compiler knows none of one element. It lies anywhere, and volatile accesses
// are not joined with a neighbour's to wider ones that the address is not aligned for.
template <class T, int size> struct VectorOf {
  using type = T __attribute__((ext_vector_type(size)));
  using in_memory = type;
};
template <class T> struct VectorOf<T, 1> {
  using type = T;
  using in_memory = volatile T;
};
template <class T> using Vector = typename VectorOf<T, width>::type;
template <class T> using VectorInMemory = typename VectorOf<T, width>::in_memory;
using Floats = Vector<float>;
using Dwords = Vector<unsigned>;

template <class V> auto element(const V& values, int i) {
  if constexpr (width == 1) return values;
  else return values[i];
}
// f(0), f(1), ...
template <class T, class F> Vector<T> vector_of(F f) {
  if constexpr (width == 1) return f(0);
  else {
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < width; ++i) result[i] = f(i);
    return result;
  }
}

struct Math {
  static Floats exp(Floats x, float factor) {
    return vector_of<float>([x, factor](int i) { return __spirv_ocl_exp(factor * element(x, i)); });
  }
  static Floats reciprocal(Floats x) { return 1.0f / x; }
  static Floats whole(Floats x) {
    return vector_of<float>([x](int i) { return __spirv_ocl_rint(element(x, i)); });
  }
};

template <class Work> void for_rows(const Team& team, int64 rows, Work work) {
  if (team.group < rows) work(team.group);
}

// A lane's columns exist all or not at all, so that their count is always `width`, and loads and stores need none.
template <class Work> void for_columns(const Team& team, Work work) {
  const int first = (team.sub_group * Team::lanes + team.lane()) * width;
#pragma unroll 1
  for (int column = first; column < problem::row_size; column += config::sub_groups * Team::lanes * width)
    work(column, width);
}

template <Dtype dtype> Floats load_floats(const Element<dtype>* from, int) {
  const Vector<Element<dtype>> values = *reinterpret_cast<const VectorInMemory<Element<dtype>>*>(from);
  return vector_of<float>([values](int i) { return widened<dtype>(element(values, i)); });
}
template <Dtype dtype> void store_rounded(Element<dtype>* to, Floats values, int) {
  *reinterpret_cast<VectorInMemory<Element<dtype>>*>(to) =
      vector_of<Element<dtype>>([values](int i) { return rounded<dtype>(element(values, i)); });
}

// Whole numbers.
inline void store_codes(signed char* to, Floats values, int) {
  *reinterpret_cast<VectorInMemory<signed char>*>(to) =
      vector_of<signed char>([values](int i) { return static_cast<signed char>(element(values, i)); });
}

// Elements 2i and 2i + 1 of two vectors, and the inverse.
inline void unweave(Floats low, Floats high, Floats& first, Floats& second) {
  const auto either = [low, high](int i) { return i < width ? element(low, i) : element(high, i - width); };
  first = vector_of<float>([either](int i) { return either(2 * i); });
  second = vector_of<float>([either](int i) { return either(2 * i + 1); });
}
inline void weave(Floats first, Floats second, Floats& low, Floats& high) {
  const auto either = [first, second](int i) { return element(i % 2 == 0 ? first : second, i / 2); };
  low = vector_of<float>(either);
  high = vector_of<float>([either](int i) { return either(width + i); });
}

inline sycl::ext::oneapi::experimental::work_group_static<float[config::sub_groups]> partial;     // of each sub-group

// Every sub-group's number, for all of them.
inline const float* of_sub_groups(const Team& team, float value) {
  float* values = *&partial;
  if (team.lane() == 0) values[team.sub_group] = value;
  constexpr auto order = __spv::MemorySemanticsMask::SequentiallyConsistent | __spv::MemorySemanticsMask::WorkgroupMemory;
  __spirv_ControlBarrier(int(__spv::Scope::Workgroup), int(__spv::Scope::Workgroup), order);
  return values;
}

inline unsigned greatest(const Team& team, Dwords values) {
  unsigned found = 0;
#pragma unroll
  for (int i = 0; i < width; ++i) found = element(values, i) > found ? element(values, i) : found;
  found = __spirv_GroupUMax(__spv::Scope::Subgroup, int(__spv::GroupOperation::Reduce), found);
  if constexpr (config::sub_groups > 1) {
    const float* all = of_sub_groups(team, __builtin_bit_cast(float, found));
#pragma unroll
    for (int i = 0; i < config::sub_groups; ++i) {
      const unsigned other = __builtin_bit_cast(unsigned, all[i]);
      found = other > found ? other : found;
    }
  }
  return found;
}

// Summed in one order: a lane's columns, the lanes of a sub-group, the sub-groups.
inline void store_sum(const Team& team, Floats values, float* to) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < width; ++i) sum += element(values, i);
  sum = __spirv_GroupFAdd(__spv::Scope::Subgroup, int(__spv::GroupOperation::Reduce), sum);
  if constexpr (config::sub_groups > 1) {
    const float* sums = of_sub_groups(team, sum);
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < config::sub_groups; ++i) sum += sums[i];
  }
  if (team.sub_group == 0 && team.lane() == 0) *to = sum;
}

}  // namespace moe_xe
