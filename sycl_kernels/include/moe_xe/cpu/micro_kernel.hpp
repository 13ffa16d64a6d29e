// The inner loop of packed operands: a block of A's rows by a panel of columns with all sums in registers.
#pragma once
#include <moe_xe/cpu/vector.hpp>
#include <type_traits>

namespace moe_xe {

constexpr bool tiled = config::isa >= Isa::amx;   // cpu/tile_kernel.hpp has the loop then

// A step of the micro-kernel along K: one fp32 element, or a dword of two bf16 (with tiles, fp16, too), or, of int8 codes, of two 16-bit
// integers or four bytes, whose sums are int32.
constexpr bool bf16_pairs = config::isa >= Isa::avx512_bf16 && problem::input == Dtype::bf16;
constexpr bool f16_pairs = config::isa == Isa::amx_fp16 && problem::input == Dtype::f16;
constexpr bool float_pairs = bf16_pairs || f16_pairs;
constexpr bool int8_steps = problem::input == Dtype::i8 && config::isa != Isa::baseline;
constexpr bool int8_quads = int8_steps && config::isa >= Isa::avx512_bf16;
constexpr int elements_per_step = int8_quads ? 4 : float_pairs || int8_steps ? 2 : 1;
template <bool> struct PackedOf { using type = float; };
template <> struct PackedOf<true> { using type = unsigned; };
using Packed = PackedOf<(elements_per_step > 1)>::type;
using PackedVector = Vector<Packed>;
using Sums = Vector<std::conditional_t<int8_steps, int, float>>;

// Pairs of 16-bit numbers, which both are.
inline Dwords pairs_of(Floats even, Floats odd) {
  const auto f16_bits = [](Floats value) {
    return __builtin_convertvector(__builtin_bit_cast(Words, __builtin_convertvector(value, Halves)), Dwords);
  };
  if constexpr (f16_pairs) return f16_bits(even) | f16_bits(odd) << 16;
  else return __builtin_bit_cast(Dwords, even) >> 16 | __builtin_bit_cast(Dwords, odd);
}

constexpr int panel_vectors = config::micro_columns / width;
constexpr int64 round_up(int64 value, int64 unit) { return (value + unit - 1) / unit * unit; }

inline void prefetch(const void* address) { asm volatile("prefetcht1 (%0)" : : "r"(address)); }

template <class Sum> Sum multiply_add(Sum sum, PackedVector a, PackedVector b) {
  if constexpr (int8_quads) {
    asm("vpdpbusd %3,%2,%0" : "=v"(sum) : "0"(sum), "v"(b), "v"(a));    // b's bytes are unsigned, a's signed
    return sum;
  } else if constexpr (int8_steps) {
    Sum products;
    asm("vpmaddwd %2,%1,%0" : "=v"(products) : "v"(a), "v"(b));
    return sum + products;
  } else if constexpr (bf16_pairs) {
    // "0" and not "+v": a tied read-write operand loses its tie on the way through SPIR-V.
    asm("vdpbf16ps %3,%2,%0" : "=v"(sum) : "0"(sum), "v"(b), "v"(a));
    return sum;
  } else {
    return __builtin_bit_cast(Floats, a) * __builtin_bit_cast(Floats, b) + sum;
  }
}

// A register sums the products of at most so many steps; then it is added to a total in memory. The error of a sum grows with
// sqrt(summed_steps + K / summed_steps) roundings instead of sqrt(K), whatever blocks a configuration packs.
constexpr int summed_steps = 256;

// Where a block's totals lie between K blocks and before they are rounded.
struct SumsInMemory {
  float* first;
  int stride;
};

// `wanted` rows of packed A times a panel, added to `from`, which null makes zero. A's rows and steps along K are row_stride
// and step_stride apart. One instance for each number of rows, so that all sums are registers.
template <int rows, int64 row_stride, int64 step_stride>
void multiply(int wanted, const Packed* a, const PackedVector* panel, int steps, SumsInMemory from, SumsInMemory to) {
  if constexpr (rows > 1)
    if (wanted < rows) return multiply<rows - 1, row_stride, step_stride>(wanted, a, panel, steps, from, to);
#pragma unroll 1
  do {   // once without steps, too: zeros
    const int end = steps < summed_steps ? steps : summed_steps;
    Sums sums[rows][panel_vectors];
#pragma unroll
    for (int row = 0; row < rows; ++row)
#pragma unroll
      for (int v = 0; v < panel_vectors; ++v) sums[row][v] = 0;
    if (from.first)   // totals of a tile are larger than the first cache
#pragma unroll
      for (int row = 0; row < rows; ++row)
#pragma unroll
        for (int column = 0; column < config::micro_columns; column += 16)
          asm volatile("prefetcht0 (%0)" : : "r"(from.first + row * from.stride + column));
#pragma unroll 1
    for (int step = 0; step < end; ++step) {
      PackedVector b[panel_vectors];
#pragma unroll
      for (int v = 0; v < panel_vectors; ++v) b[v] = panel[v];
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        const PackedVector broadcast = a[row * row_stride];
#pragma unroll
        for (int v = 0; v < panel_vectors; ++v) sums[row][v] = multiply_add(sums[row][v], broadcast, b[v]);
      }
      a += step_stride;
      panel += panel_vectors;
    }
    if (from.first)
#pragma unroll
      for (int row = 0; row < rows; ++row)
#pragma unroll
        for (int v = 0; v < panel_vectors; ++v) sums[row][v] += load<Sums>(from.first + row * from.stride + v * width);
#pragma unroll
    for (int row = 0; row < rows; ++row)
#pragma unroll
      for (int v = 0; v < panel_vectors; ++v) store(to.first + row * to.stride + v * width, sums[row][v]);
    from = to;
    steps -= summed_steps;
  } while (steps > 0);
}

}  // namespace moe_xe
