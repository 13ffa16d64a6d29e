// Runs of codes as numbers in registers, in the order in which they are cheapest to decode, and rows of A in the same order.
#pragma once
#include <moe_xe/cpu/codes.hpp>

namespace moe_xe {

// Eight 4-bit codes lie in a lane and become as many vectors: lane l of vector i is number 8 * l + i. vdpbf16ps takes two of a lane at
// once, numbers 8 * l + i and 8 * l + i + 4. 8-bit codes stay in their own order.
constexpr bool code_pairs = bf16_pairs && code_bits == 4;
constexpr int span = code_bits == 4 ? 8 * width : 16;    // codes that are decoded at once
constexpr int number_vectors = code_pairs ? 4 : span / width;
using Numbers = Vector<std::conditional_t<code_pairs, unsigned, float>>;

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

template <int vectors> void decode(const unsigned char* codes, Numbers (&numbers)[vectors]) {
  if constexpr (code_bits == 8) {
    const Several<float, span> all = floats_of_bytes<problem::codes, span>(codes);
    __builtin_memcpy(numbers, &all, sizeof numbers);
  } else if constexpr (config::isa == Isa::avx2) decode_bytes(load<Dwords>(codes), numbers);
  else {
    const Dwords raw = load<Dwords>(codes);
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      if constexpr (code_pairs) numbers[i] = decode_words(raw >> 4 * i);
      else numbers[i] = numbers_of(raw >> 4 * i);
    }
  }
}

// Rows of A for `decode`'s numbers. 8-bit codes take them as they lie.
constexpr bool spread_tokens = code_bits == 4;
using Token = std::conditional_t<spread_tokens, Packed, Input>;

template <class Token> Numbers tokens_at(const Token* row, int64 k, int i) {
  if constexpr (spread_tokens) return load<Numbers>(row + k / elements_per_step + i * width);
  else return load_floats<problem::input>(row + k + i * width);
}

template <class Numbers> Floats add_products(Floats sum, Numbers tokens, Numbers numbers) {
  if constexpr (code_pairs) return multiply_add(sum, tokens, numbers);
  else return tokens * numbers + sum;
}
inline Numbers ones() {
  if constexpr (code_pairs) return Numbers(0x3f803f80u);
  else return Numbers(1);
}

// A row for 4-bit codes, with zeros up to a whole span.
inline void spread_row(const Input* from, Packed* to) {
#pragma unroll 1
  for (int64 k = 0; k < problem::k; k += span) {
    const int left = problem::k - k < span ? int(problem::k - k) : span;
    Input elements[span] = {};
#pragma unroll 1
    for (int i = 0; i < left; ++i) elements[i] = from[k + i];
    if constexpr (code_pairs) {
      auto* words = reinterpret_cast<unsigned short*>(to + k / 2);
#pragma unroll 1
      for (int lane = 0; lane < width; ++lane)
#pragma unroll
        for (int i = 0; i < 8; ++i) words[2 * (i % 4 * width + lane) + i / 4] = elements[8 * lane + i];
    } else {
#pragma unroll 1
      for (int lane = 0; lane < width; ++lane)
#pragma unroll
        for (int i = 0; i < 8; ++i) to[k + i * width + lane] = widened<problem::input>(elements[8 * lane + i]);
    }
  }
}

}  // namespace moe_xe
