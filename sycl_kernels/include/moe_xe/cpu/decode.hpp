// Runs of a row of [N, K] weights as numbers in registers, in the order in which they are cheapest to come by, and rows of A in the same.
#pragma once
#include <moe_xe/cpu/pack.hpp>

namespace moe_xe {

// 4-bit codes: eight lie in a lane and become as many vectors, lane l of vector i is number 8 * l + i. vdpbf16ps takes two of a lane at
// once, numbers 8 * l + i and 8 * l + i + 4.
constexpr bool nibbles = quantised && code_bits == 4;
// FP8 as pairs of bf16: two tables of bytes, which are interleaved.
constexpr bool byte_tables = bf16_pairs && (problem::codes == Codes::e4m3 || problem::codes == Codes::e5m2);

constexpr bool one_group = problem::group_columns >= problem::k;
constexpr int vector_elements = width * elements_per_step;

// The longest run of a group's 8-bit codes.
constexpr int run_of_bytes(int longest, int shortest) {
  int run = longest;
  while (run > shortest && !one_group && problem::group_columns % run != 0) run /= 2;
  return run;
}

// Elements of K that are decoded at once.
constexpr int span = nibbles       ? 8 * width
                     : !quantised  ? 4 * vector_elements
                     : byte_tables ? 64
                                   : run_of_bytes(width < 8 ? 32 : 64, bf16_pairs ? 32 : 16);
constexpr int number_vectors = span / vector_elements;
constexpr int span_bytes = quantised ? span * code_bits / 8 : span * int(sizeof(Input));
using Numbers = PackedVector;

// bf16 bits of the number of a 4-bit code.
inline unsigned number_bits(int code) {
  return __builtin_bit_cast(unsigned, number_of<problem::codes>(unsigned(code)) - common_zero) >> 16;
}

// Of the lowest four bits of each word. vpermw looks at five bits of an index: the table is there twice, and nothing is masked.
inline Dwords decode_words(Dwords codes) {
  Dwords table, numbers;
#pragma unroll
  for (int i = 0; i < width; ++i) table[i] = number_bits(2 * i % 16) | number_bits((2 * i + 1) % 16) << 16;
  asm("vpermw %2,%1,%0" : "=v"(numbers) : "v"(codes), "v"(table));
  return numbers;
}

inline Dwords look_up_bytes(Dwords table, Dwords codes) {
  Dwords bytes;
  asm("vpshufb %2,%1,%0" : "=v"(bytes) : "v"(table), "v"(codes));
  return bytes;
}

// AVX2: the two bytes of a bf16 number come from two tables. A byte's two codes are in lane byte / 4: bytes 0 and 1 of each lane go first.
inline void decode_bytes(Dwords raw, Floats (&numbers)[8]) {
  Dwords order, low, high;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const unsigned first = i % 2 * 8 + i % 4 / 2 * 2;
    order[i] = (first | (first + 1) << 8) | ((first + 4) << 16) | ((first + 5) << 24);
    low[i] = high[i] = 0;
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
      const unsigned bits = number_bits(i % 4 * 4 + byte);
      low[i] |= (bits & 255u) << byte * 8;
      high[i] |= bits >> 8 << byte * 8;
    }
  }
  raw = look_up_bytes(raw, order);
#pragma unroll
  for (int nibble = 0; nibble < 2; ++nibble) {
    const Dwords codes = (nibble == 0 ? raw : raw >> 4) & 0x0f0f0f0fu, lows = look_up_bytes(low, codes), highs = look_up_bytes(high, codes);
    Dwords words[2];
    asm("vpunpcklbw %2,%1,%0" : "=v"(words[0]) : "v"(lows), "v"(highs));
    asm("vpunpckhbw %2,%1,%0" : "=v"(words[1]) : "v"(lows), "v"(highs));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      numbers[4 * half + nibble] = __builtin_bit_cast(Floats, words[half] << 16);
      numbers[4 * half + 2 + nibble] = __builtin_bit_cast(Floats, words[half] & 0xffff0000u);
    }
  }
}

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
  else if constexpr (!nibbles) {
    constexpr int piece = span < 2 * width ? span : 2 * width;
#pragma unroll
    for (int i = 0; i < span; i += piece) {
      const Several<float, piece> floats = floats_of_bytes<problem::codes, piece>(from + i);
      Floats parts[piece / width];
      __builtin_memcpy(parts, &floats, sizeof parts);
      if constexpr (bf16_pairs) numbers[i / piece] = rounded_pairs(parts[0], parts[1]);
      else __builtin_memcpy(numbers + i / width, parts, sizeof parts);
    }
  } else if constexpr (config::isa == Isa::avx2) decode_bytes(load<Dwords>(from), numbers);
  else {
    const Dwords raw = load<Dwords>(from);
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      if constexpr (bf16_pairs) numbers[i] = decode_words(raw >> 4 * i);
      else numbers[i] = numbers_of(raw >> 4 * i);
    }
  }
}

// Numbers of FP8 codes are so many times too large.
constexpr float number_unit = quantised && code_bits == 8 && !byte_tables ? code_unit : 1.f;

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

// A row of A in the order of `decode`, with zeros up to a whole span.
inline void spread_row(const Input* from, Packed* to) {
  constexpr bool whole_pairs = bf16_pairs && !nibbles;
  constexpr int dealt = nibbles ? 8 : !quantised && !bf16_pairs ? chunk_vectors : 1;
#pragma unroll 1
  for (int64 k = 0; k < problem::k; k += span, to += span / elements_per_step) {
    const int left = problem::k - k < span ? int(problem::k - k) : span;
    if constexpr (whole_pairs) {
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
      for (int first = 0; first < span; first += dealt * width) {
        Floats elements[dealt];
#pragma unroll
        for (int i = 0; i < dealt; ++i)
          elements[i] = load_floats<problem::input>(from + k + first + i * width, left - first - i * width);
        deal(elements);
#pragma unroll
        for (int i = 0; i < dealt / elements_per_step; ++i) {
          if constexpr (bf16_pairs) store(to + i * width, DenseWeights::pairs(elements[i], elements[i + dealt / 2]));
          else store(to + first + i * width, elements[i]);
        }
      }
    }
  }
}

}  // namespace moe_xe
