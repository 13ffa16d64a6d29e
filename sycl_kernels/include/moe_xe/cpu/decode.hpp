// Runs of a row of [N, K] weights, dense or FP8, as numbers in registers, in the order in which they are cheapest to come by, and rows of A in
// the same.
#pragma once
#include <moe_xe/cpu/pack.hpp>

namespace moe_xe {

// FP8 as pairs of bf16: two tables of bytes, which are interleaved.
constexpr bool byte_tables = bf16_pairs && quantised && !integer_dots;

constexpr bool one_group = problem::group_columns >= problem::k;
constexpr int vector_elements = width * elements_per_step;

// The longest run of a group's FP8 codes.
constexpr int run_of_bytes() {
  int run = width < 8 ? 32 : 64;
  while (run > 16 && !one_group && problem::group_columns % run != 0) run /= 2;
  return run;
}

// Elements of K that are decoded at once.
constexpr int number_span = !quantised || integer_dots ? 4 * vector_elements : byte_tables ? 64 : run_of_bytes();
constexpr int number_vectors = number_span / vector_elements;
using Numbers = PackedVector;

// The two bytes of all bf16 numbers of FP8 codes without a sign.
struct ByteTables {
  unsigned char low[128], high[128];
};
constexpr ByteTables byte_tables_of() {
  ByteTables tables{};
  for (unsigned code = 0; code < 128; ++code) {
    const unsigned bits = __builtin_bit_cast(unsigned, number_of<problem::codes>(code)) >> 16;
    tables.low[code] = bits & 255u;
    tables.high[code] = bits >> 8;
  }
  return tables;
}
inline constexpr ByteTables fp8_bytes = byte_tables_of();

// Looks at seven bits of each byte. An instruction of VBMI, which all CPUs with AVX512-BF16 have but Cooper Lake.
inline Dwords look_up_128(const unsigned char* table, Dwords codes) {
  Dwords bytes;
  asm("vpermi2b %3,%2,%0" : "=v"(bytes) : "0"(codes), "v"(load<Dwords>(table)), "v"(load<Dwords>(table + 64)));
  return bytes;
}

inline void decode_fp8(Dwords codes, Numbers (&numbers)[2]) {
  const Dwords low = look_up_128(fp8_bytes.low, codes), high = look_up_128(fp8_bytes.high, codes) | (codes & 0x80808080u);
  asm("vpunpcklbw %2,%1,%0" : "=v"(numbers[0]) : "v"(low), "v"(high));
  asm("vpunpckhbw %2,%1,%0" : "=v"(numbers[1]) : "v"(low), "v"(high));
}

template <int vectors> void decode(const unsigned char* from, Numbers (&numbers)[vectors]) {
  if constexpr (!quantised) {
#pragma unroll
    for (int i = 0; i < vectors; ++i)
      numbers[i] = packed(DenseWeights::chunk(reinterpret_cast<const Input*>(from), i / chunk_vectors * chunk), i % chunk_vectors);
  } else if constexpr (byte_tables) decode_fp8(load<Dwords>(from), numbers);
  else {
    constexpr int piece = number_span < 2 * width ? number_span : 2 * width;
#pragma unroll
    for (int i = 0; i < number_span; i += piece) {
      const Several<float, piece> floats = floats_of_bytes<problem::codes, piece>(from + i);
      Floats parts[piece / width];
      __builtin_memcpy(parts, &floats, sizeof parts);
      __builtin_memcpy(numbers + i / width, parts, sizeof parts);
    }
  }
}

// Numbers of FP8 codes are so many times too large.
constexpr float number_unit = quantised && !byte_tables ? code_unit : 1.f;

// A row of A in the order of `decode`, with zeros up to a whole span.
inline void spread_numbers(const Input* from, Packed* to) {
  constexpr int dealt = !quantised && !bf16_pairs ? chunk_vectors : 1;
#pragma unroll 1
  for (int64 k = 0; k < problem::k; k += number_span, to += number_span / elements_per_step) {
    const int left = problem::k - k < number_span ? int(problem::k - k) : number_span;
    if constexpr (bf16_pairs) {
      Dwords pairs[number_vectors];
#pragma unroll
      for (int i = 0; i < number_vectors; ++i) pairs[i] = DenseWeights::chunk(from + k, i * vector_elements, left - i * vector_elements);
      if constexpr (byte_tables) {
        store(to, shuffle<Lanes<0>>(pairs[0], pairs[1]));
        store(to + width, shuffle<Lanes<1>>(pairs[0], pairs[1]));
      } else {
        __builtin_memcpy(to, pairs, sizeof pairs);
      }
    } else {
#pragma unroll
      for (int first = 0; first < number_span; first += dealt * width) {
        Floats elements[dealt];
#pragma unroll
        for (int i = 0; i < dealt; ++i)
          elements[i] = load_floats<problem::input>(from + k + first + i * width, left - first - i * width);
        deal(elements);
#pragma unroll
        for (int i = 0; i < dealt; ++i) store(to + first + i * width, elements[i]);
      }
    }
  }
}

}  // namespace moe_xe
