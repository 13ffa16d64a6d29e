// Codes that are whole numbers as integers of 16 bits, and rows of A as the same: products of a few rows are sums of integers.
#pragma once
#include <moe_xe/cpu/pack.hpp>

namespace moe_xe {

constexpr float word_unit = problem::codes == Codes::e2m1 ? 0.5f : 1.f;     // e2m1's numbers are halves

// A vector of codes is word_vectors vectors of integers: codes i and i + word_vectors of each of its lanes are in vector i.
using Shorts = Several<short, 2 * width>;
constexpr int lane_codes = 32 / code_bits, word_vectors = lane_codes / 2, vector_codes = lane_codes * width;

// The integer that is a 4-bit code's number less all codes' zero, in units of word_unit.
constexpr int integer_of(int code) { return int((number_of<problem::codes>(unsigned(code)) - common_zero) / word_unit); }

// Of the lowest four bits of each word. vpermw looks at five bits of an index: the table is there twice, and nothing is masked.
inline Shorts look_up_words(Shorts codes) {
  Shorts table, integers;
#pragma unroll
  for (int i = 0; i < 2 * width; ++i) table[i] = short(integer_of(i % 16));
  asm("vpermw %2,%1,%0" : "=v"(integers) : "v"(codes), "v"(table));
  return integers;
}

// Of the lowest four bits of each byte.
inline Shorts look_up_bytes(Dwords codes) {
  Dwords table, integers;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    table[i] = 0;
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) table[i] |= (unsigned(integer_of(i % 4 * 4 + byte)) & 255u) << 8 * byte;
  }
  asm("vpshufb %2,%1,%0" : "=v"(integers) : "v"(table), "v"(codes & 0x0f0f0f0fu));
  return __builtin_bit_cast(Shorts, integers);
}

// e2m1 by arithmetic, of the lowest four bits of each word.
inline Shorts twice_e2m1(Shorts codes) {
  const Shorts size = codes & 7, normal = (2 + (size & 1)) << (size >> 1) >> 1, twice = size == 0 ? size : normal;
  return (codes & 8) == 0 ? twice : -twice;
}

inline void read_words(const unsigned char* from, Shorts (&words)[word_vectors]) {
  static_assert(common_zero == 0.f || (problem::codes == Codes::uint4 && common_zero == 8.f));
  Dwords raw = load<Dwords>(from);
  if constexpr (common_zero == 8.f && !wide) raw ^= 0x88888888u;   // codes less 8 as int4
  const Shorts all = __builtin_bit_cast(Shorts, raw);
  if constexpr (problem::codes == Codes::e2m1 && config::isa == Isa::avx2) {
    const Shorts even = look_up_bytes(raw), odd = look_up_bytes(raw >> 4);
    words[0] = even << 8 >> 8, words[1] = odd << 8 >> 8, words[2] = even >> 8, words[3] = odd >> 8;
  } else {
#pragma unroll
    for (int i = 0; i < word_vectors; ++i) {
      if constexpr (code_bits == 8) words[i] = all << (8 - 8 * i) >> 8;
      else if constexpr (wide) words[i] = look_up_words(all >> 4 * i);
      else if constexpr (problem::codes == Codes::e2m1) words[i] = twice_e2m1(all >> 4 * i);
      else if constexpr (problem::codes == Codes::uint4 && common_zero == 0.f) words[i] = all >> 4 * i & 15;
      else words[i] = all << (12 - 4 * i) >> 12;
    }
  }
}

// A row of A, for each vector of codes: lane_codes neighbours as multiples of a unit that they share, and behind them all units. The largest
// takes 15 bits, or, where results have more, 29 in two words.
constexpr int token_words = problem::input == Dtype::f32 || problem::output == Dtype::f32 ? 2 : 1;
constexpr int token_vectors = token_words * word_vectors + 1;
constexpr float low_unit = 0x1p-15f;

// sums += in lane i words 2 * i and 2 * i + 1 of one times those of the other.
inline void add_products(Vector<int>& sums, Shorts a, Shorts b) {
  if constexpr (config::isa >= Isa::avx512_bf16) {
    asm("vpdpwssd %3,%2,%0" : "=v"(sums) : "0"(sums), "v"(a), "v"(b));
  } else if constexpr (config::isa != Isa::baseline) {
    Vector<int> products;
    asm("vpmaddwd %2,%1,%0" : "=v"(products) : "v"(a), "v"(b));
    sums += products;
  } else {
    const auto first = __builtin_bit_cast(Vector<int>, a), second = __builtin_bit_cast(Vector<int>, b);
    sums += (first << 16 >> 16) * (second << 16 >> 16) + (first >> 16) * (second >> 16);
  }
}

// Lanes: sums of products of codes with a row's integers, in A's units.
inline Floats sums_of_words(const Shorts (&codes)[word_vectors], const Packed* tokens) {
  Floats sums;
#pragma unroll
  for (int word = token_words - 1; word >= 0; --word) {
    Vector<int> products = 0;
#pragma unroll
    for (int i = 0; i < word_vectors; ++i) add_products(products, codes[i], load<Shorts>(tokens + (word * word_vectors + i) * width));
    const Floats numbers = __builtin_convertvector(products, Floats);
    sums = word == token_words - 1 ? numbers : sums * low_unit + numbers;
  }
  return sums * load<Floats>(tokens + token_words * word_vectors * width);
}

// The row, with zeros up to a whole vector of codes.
inline void spread_words(const Input* from, Packed* to) {
  using Ints = Vector<int>;
  constexpr int infinity = 0x7f800000, exponent_bias = 127, bits = token_words == 2 ? 13 : 14;
  constexpr float magic = 0x1.8p23f;    // its sum with an integer has it in the low bits
#pragma unroll 1
  for (int64 k = 0; k < problem::k; k += vector_codes) {
    const int left = problem::k - k < vector_codes ? int(problem::k - k) : vector_codes;
    Floats elements[lane_codes];
#pragma unroll
    for (int i = 0; i < lane_codes; ++i) elements[i] = load_floats<problem::input>(from + k + i * width, left - i * width);
    deal(elements);
    Ints largest = 0;
#pragma unroll
    for (int i = 0; i < lane_codes; ++i) {
      const Ints size = __builtin_bit_cast(Ints, elements[i]) & 0x7fffffff;
      largest = largest > size ? largest : size;
    }
    // The unit is a power of two. Lanes with an infinity or NaN have that as theirs, and only infinities are not zero.
    const Ints is_number = largest < infinity, least = bits + 1, exponent = largest >> 23;
    const Ints shift = (exponent > least ? exponent : least) - bits;
    const Floats unit = __builtin_bit_cast(Floats, is_number ? shift << 23 : largest);
    const Floats scale = __builtin_bit_cast(Floats, (2 * exponent_bias - shift) << 23);
    Ints words[token_words][lane_codes];
#pragma unroll
    for (int i = 0; i < lane_codes; ++i) {
      const Ints element = __builtin_bit_cast(Ints, elements[i]);
      const Ints infinite = (element & 0x7fffffff) == infinity ? element >> 31 | 1 : 0;
      Floats scaled = elements[i] * scale;
#pragma unroll
      for (int word = 0; word < token_words; ++word) {
        const Floats sum = scaled + magic;
        words[word][i] = is_number ? __builtin_bit_cast(Ints, sum) : word == 0 ? infinite : Ints(0);
        scaled = (scaled - (sum - magic)) * (1.f / low_unit);
      }
    }
#pragma unroll
    for (int word = 0; word < token_words; ++word)
#pragma unroll
      for (int i = 0; i < word_vectors; ++i, to += width) store(to, (words[word][i] & 0xffff) | words[word][i + word_vectors] << 16);
    store(to, unit);
    to += width;
  }
}

}  // namespace moe_xe
