// The best of many values that lie spread over lanes (gpu/lanes.hpp or cpu/lanes.hpp), one after the other.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

// Vectors that `count` values fill: value i is in vector i / lanes, lane i % lanes.
constexpr int slots_of(int count) { return (count + lanes - 1) / lanes; }

// Floats as integers of the same order: zeros of both signs are equal, and every NaN is below every number.
constexpr int no_key = -2147483647 - 1;   // below all: taken, or there is no such value
constexpr int nan_key = no_key + 1;

constexpr float minus_infinity = -__builtin_inff();

template <class Keys, class Values> inline Keys keys_from(Values values) {
  const Keys bits = __builtin_bit_cast(Keys, values);
  return values == values ? (bits < 0 ? no_key - bits : bits) : Keys(nan_key);
}

inline float value_of(int key) { return __builtin_bit_cast(float, key < 0 ? no_key - key : key); }

// Equal keys are taken in the order of their numbers.
template <int size> struct Ranking {
  static constexpr int slots = slots_of(size);
  Ints keys[slots];

  // The number of the largest key, which is never taken again.
  int take_best() {
    Ints best = no_key, numbers = 0;
#pragma unroll unrolled
    for (int slot = 0; slot < slots; ++slot) {
      const Ints number = slot * lanes + lane_numbers();
      const Ints key = keys[slot] = number == taken ? Ints(no_key) : keys[slot];
      numbers = key > best ? number : numbers;
      best = key > best ? key : best;
    }
    return taken = min_of(best == max_of(best) ? numbers : Ints(size));
  }

 private:
  int taken = -1;   // the last one: its key is removed on the next walk
};

}  // namespace moe_xe
