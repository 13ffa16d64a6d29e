// Vectors of the CPU device: loads that widen to fp32, stores that round once, and the transposition that packing
// [N, K] weights needs. One work-item works with explicit vectors; nothing is left to the device's vectoriser.
#pragma once
#include <moe_xe/scalar.hpp>
#include <utility>

namespace moe_xe {

constexpr bool wide = config::isa >= Isa::avx512;
constexpr int width = wide ? 16 : config::isa == Isa::avx2 ? 8 : 4;   // dwords of a vector register

template <class T> using Vector = T __attribute__((ext_vector_type(width)));
using Floats = Vector<float>;
using Dwords = Vector<unsigned>;
using Words = Vector<unsigned short>;
using Halves = Vector<_Float16>;

template <class T> struct Unaligned { T value; } __attribute__((packed, may_alias));
template <class T> T load(const void* from) { return static_cast<const Unaligned<T>*>(from)->value; }
template <class T> void store(void* to, T value) { static_cast<Unaligned<T>*>(to)->value = value; }

using Input = Element<problem::input>;
using Output = Element<problem::output>;

// `width` elements as fp32.
template <Dtype dtype> Floats load_floats(const void* from) {
  if constexpr (dtype == Dtype::f32) return load<Floats>(from);
  else if constexpr (dtype == Dtype::f16) return __builtin_convertvector(load<Halves>(from), Floats);
  else if constexpr (dtype == Dtype::i8) return __builtin_convertvector(load<Vector<signed char>>(from), Floats);
  else return __builtin_bit_cast(Floats, __builtin_convertvector(load<Words>(from), Dwords) << 16);
}

// Rounds to bf16 in the low half of each lane, as scalar.hpp does.
inline Dwords bf16_bits(Floats value) {
  const Dwords bits = __builtin_bit_cast(Dwords, value);
  const Dwords rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Dwords quiet = (bits >> 16) | 0x40u;
  return value == value ? rounded : quiet;
}

template <Dtype dtype> void store_rounded(void* to, Floats value) {
  if constexpr (dtype == Dtype::f32) store(to, value);
  else if constexpr (dtype == Dtype::f16) store(to, __builtin_convertvector(value, Halves));
  else store(to, __builtin_convertvector(bf16_bits(value), Words));
}

// The compiler may not know this value. Loops over a constant part of a vector become vectors of as many elements, for
// which the CPU device lacks functions (12) or at which its compiler crashes (2 or 4 of bf16).
inline int not_constant(int count) {
  asm("" : "+r"(count));
  return count;
}

// The first `count` elements, the others zero: nothing outside a row is read or written.
template <class T, int size> struct Partial {
  T element[size] = {};
  Partial() = default;
  Partial(const T* from, int count) {
    count = not_constant(count);
    for (int i = 0; i < count; ++i) element[i] = from[i];
  }
  void copy_to(T* to, int count) const {
    count = not_constant(count);
    for (int i = 0; i < count; ++i) to[i] = element[i];
  }
};

template <Dtype dtype> Floats load_floats(const Element<dtype>* from, int count) {
  if (count >= width) return load_floats<dtype>(from);
  return load_floats<dtype>(Partial<Element<dtype>, width>(from, count).element);
}

template <Dtype dtype> void store_rounded(Element<dtype>* to, Floats value, int count) {
  if (count >= width) return store_rounded<dtype>(to, value);
  Partial<Element<dtype>, width> rounded;
  store_rounded<dtype>(rounded.element, value);
  rounded.copy_to(to, count);
}

template <class V, int... index> V shuffle(V a, V b, std::integer_sequence<int, index...>) {
  return __builtin_shufflevector(a, b, index...);
}
// Element i of the result is element `Select::of(i)` of a followed by b.
template <class Select, int... i> constexpr auto selected(std::integer_sequence<int, i...>) {
  return std::integer_sequence<int, Select::of(i)...>{};
}
template <class Select, class V> V shuffle(V a, V b) {
  return shuffle(a, b, selected<Select>(std::make_integer_sequence<int, width>{}));
}

// Every second element of two vectors, from the first or the second one on.
template <int part> struct EverySecond {
  static constexpr int of(int i) { return 2 * i + part; }
};
inline void unweave(Floats low, Floats high, Floats& gate, Floats& up) {
  gate = shuffle<EverySecond<0>>(low, high);
  up = shuffle<EverySecond<1>>(low, high);
}

// Deals elements out like cards: element i of every run of `vectors` elements goes to vector i.
template <int vectors> void deal(Floats (&cards)[vectors]) {
#pragma unroll
  for (int round = 1; round < vectors; round *= 2) {
    Floats dealt[vectors];
#pragma unroll
    for (int i = 0; i < vectors; i += 2) unweave(cards[i], cards[i + 1], dealt[i / 2], dealt[(vectors + i) / 2]);
    __builtin_memcpy(cards, dealt, sizeof cards);
  }
}

// Lane i, for i < count: the sum of values[i]'s lanes.
template <int count> Floats sums_of(Floats (&values)[count]) {
  static_assert(count > 0 && (count & (count - 1)) == 0 && count <= width);
#pragma unroll
  for (int lanes = width, left = count; lanes > 1; lanes /= 2, left = (left + 1) / 2)
#pragma unroll
    for (int i = 0; i < left; i += 2) {
      Floats even, odd;
      unweave(values[i], values[left > 1 ? i + 1 : i], even, odd);
      values[i / 2] = even + odd;
    }
  return values[0];
}
inline float sum_of(Floats value) {
  Floats values[] = {value};
  return sums_of(values)[0];
}

// Within 128-bit lanes, interleaves the low (half 0) or high (half 1) groups of `group` dwords of a and b.
template <int group, int half> struct Interleave {
  static constexpr int of(int i) {
    const int lane = i / 4, place = i % 4;
    const bool from_b = (place / group) % 2;
    return lane * 4 + half * 2 + place / (2 * group) * group + place % group + (from_b ? width : 0);
  }
};
// The even (half 0) or odd (half 1) 128-bit lanes of a, then of b.
template <int half> struct Lanes {
  static constexpr int of(int i) {
    constexpr int lanes = width / 4;
    return (i / 4 * 2 + half) % lanes * 4 + i % 4 + (i / 4 >= lanes / 2 ? width : 0);
  }
};

// rows[i][j] becomes rows[j][i].
inline void transpose(Dwords (&rows)[width]) {
  Dwords pairs[width];
#pragma unroll
  for (int i = 0; i < width; i += 2) {
    pairs[i] = shuffle<Interleave<1, 0>>(rows[i], rows[i + 1]);
    pairs[i + 1] = shuffle<Interleave<1, 1>>(rows[i], rows[i + 1]);
  }
#pragma unroll
  for (int i = 0; i < width; i += 4)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[i + 2 * half] = shuffle<Interleave<2, 0>>(pairs[i + half], pairs[i + half + 2]);
      rows[i + 2 * half + 1] = shuffle<Interleave<2, 1>>(pairs[i + half], pairs[i + half + 2]);
    }
  // rows[4 * q + c], lane l: rows 4q..4q+3 of column 4l + c. What is left is to transpose the 128-bit lanes.
  if constexpr (width == 8) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Dwords low = rows[c], high = rows[4 + c];
      rows[c] = shuffle<Lanes<0>>(low, high);
      rows[4 + c] = shuffle<Lanes<1>>(low, high);
    }
  } else if constexpr (width == 16) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Dwords even_low = shuffle<Lanes<0>>(rows[c], rows[4 + c]);
      const Dwords odd_low = shuffle<Lanes<1>>(rows[c], rows[4 + c]);
      const Dwords even_high = shuffle<Lanes<0>>(rows[8 + c], rows[12 + c]);
      const Dwords odd_high = shuffle<Lanes<1>>(rows[8 + c], rows[12 + c]);
      rows[c] = shuffle<Lanes<0>>(even_low, even_high);
      rows[8 + c] = shuffle<Lanes<1>>(even_low, even_high);
      rows[4 + c] = shuffle<Lanes<0>>(odd_low, odd_high);
      rows[12 + c] = shuffle<Lanes<1>>(odd_low, odd_high);
    }
  }
}

}  // namespace moe_xe
