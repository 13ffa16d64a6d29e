// Sums of a part of K in memory, as a sub-group's registers have them: a message stores or loads eight registers of 16 lanes.
#pragma once
#include <moe_xe/queue/split_k.hpp>
#include <moe_xe/xe/atoms.hpp>

namespace moe_xe {

using SumBlock = vec<float, 8> __attribute__((aligned(16)));

template <int rows, int columns>
[[gnu::always_inline]] inline void save_sums(const vec<float, 8> (&sums)[rows][columns], float* to, int lane) {
  auto* blocks = reinterpret_cast<SumBlock*>(to) + lane;
  unrolled<rows * columns>([&](auto i) __attribute__((always_inline)) { blocks[i * 16] = sums[i / columns][i % columns]; });
}

// The sums of all parts, the first one's at `from`.
template <int rows, int columns>
[[gnu::always_inline]] inline void add_parts(vec<float, 8> (&sums)[rows][columns], const float* from, int lane) {
  unrolled<rows * columns>([&](auto i) __attribute__((always_inline)) {
    auto& sum = sums[i / columns][i % columns];
    unrolled<config::splits>([&](auto part) __attribute__((always_inline)) {
      const vec<float, 8> added = reinterpret_cast<const SumBlock*>(from + part * part_floats)[i * 16 + lane];
      sum = part == 0 ? added : sum + added;
    });
  });
}

}  // namespace moe_xe
