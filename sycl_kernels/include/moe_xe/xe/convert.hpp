// Codes to dpas operands A: 8 rows of 16 weights in the activations' type, rows 2r and 2r + 1 in register r. Each line of text is one
// instruction. Bits are moved until a 16-bit number has the code's value times a power of two, or an integer above it; what multiplies
// it has the group's scale and that power, and rounds. bf16 and f16 numbers below the normal ones (denormals) are kept by these
// instructions, in the mode that kernels are compiled for; the forms without them take more.
#pragma once
#include <moe_xe/xe/atoms.hpp>
#include <moe_xe/operands/expert_codes.hpp>

namespace moe_xe {

inline constexpr bool to_f16 = problem::input == Dtype::f16;
inline constexpr bool integer_codes = problem::codes == Codes::int4 || problem::codes == Codes::uint4 || problem::codes == Codes::int8;
// Integers count from 0, signed ones with their sign flipped: where 0 is then.
inline constexpr float code_origin = problem::codes == Codes::int4 ? 8.0f : problem::codes == Codes::int8 ? 128.0f : 0.0f;

constexpr float power_of_two(int exponent) {
  float power = 1.0f;
  for (int i = 0; i < exponent; ++i) power *= 2.0f;
  for (int i = 0; i > exponent; --i) power *= 0.5f;
  return power;
}

// log2 of what a number that was made of a code lacks.
constexpr int code_shift() {
  switch (problem::codes) {
    case Codes::e2m1: return to_f16 ? 14 : 126;
    case Codes::int8: return to_f16 ? 10 : 133;
    case Codes::e4m3: return to_f16 ? 8 : 120;
    case Codes::e5m2: return to_f16 ? 8 : 112;
    default: return to_f16 ? 10 : 0;
  }
}
// Operands are weights / 2^sum_shift, which sums are multiplied by, where a scale times 2^code_shift would not be a number.
inline constexpr int sum_shift = to_f16 ? (problem::codes == Codes::e2m1 && problem::scale_type == ScaleType::e4m3 ? 10 : 0)
                                        : (code_shift() == 0 ? 0 : 32);

#define MOE_XE_FOUR(line) line("0", "0,0", "0,0") line("1", "0,16", "0,32") line("2", "0,32", "1,0") line("3", "0,48", "1,32")
#define MOE_XE_CODES                                                                                                          \
  "{\n.decl T v_type=G type=UW num_elts=128 alias=<%0,0>\n.decl TW v_type=G type=W num_elts=128 alias=<%0,0>\n"                \
  ".decl B v_type=G type=B num_elts=128 alias=<%1,0>\n.decl UB v_type=G type=UB num_elts=128 alias=<%1,0>\n"
#define MOE_XE_OPERAND                                                                                                        \
  "{\n.decl T v_type=G type=UW num_elts=128 alias=<%0,0>\n.decl TW v_type=G type=W num_elts=128 alias=<%0,0>\n"                \
  ".decl TD v_type=G type=D num_elts=64 alias=<%0,0>\n.decl BF v_type=G type=BF num_elts=128 alias=<%0,0>\n"                   \
  ".decl HF v_type=G type=HF num_elts=128 alias=<%0,0>\n"

// Two lanes read each byte, and treat it differently: by the halves of `by`, of which the lower one is for the lower code.
#define MOE_XE_NIBBLE_LINE(op, r, nibbles) op " (M1_NM,32) T(" r ",0)<1> UB(" nibbles ")<1;2,0> BY(0,0)<0;2,1>\n"
#define MOE_XE_NIBBLES(op, line)                                                                     \
  vec<int32, 4> words;                                                                               \
  asm(MOE_XE_CODES ".decl BY v_type=G type=UW num_elts=2 alias=<%2,0>\n" MOE_XE_FOUR(line) "}\n" : "=rw"(words) : "rw"(codes), "rw.u"(by)); \
  return words
#define MOE_XE_SHL(r, nibbles, bytes) MOE_XE_NIBBLE_LINE("shl", r, nibbles)
#define MOE_XE_SHR(r, nibbles, bytes) MOE_XE_NIBBLE_LINE("shr", r, nibbles)
#define MOE_XE_AND(r, nibbles, bytes) MOE_XE_NIBBLE_LINE("and", r, nibbles)
[[gnu::always_inline]] inline vec<int32, 4> shift_nibbles_left(int32 codes, int by) { MOE_XE_NIBBLES("shl", MOE_XE_SHL); }
[[gnu::always_inline]] inline vec<int32, 4> shift_nibbles_right(int32 codes, int by) { MOE_XE_NIBBLES("shr", MOE_XE_SHR); }
[[gnu::always_inline]] inline vec<int32, 4> mask_nibbles(int32 codes, int by) { MOE_XE_NIBBLES("and", MOE_XE_AND); }

// Bytes with their sign to words, shifted; and unsigned with the sign flipped.
template <int by> [[gnu::always_inline]] inline vec<int32, 4> shift_bytes_left(vec<int32, 2> codes) {
  vec<int32, 4> words;
#define MOE_XE_LINE(r, nibbles, bytes) "shl (M1_NM,32) TW(" r ",0)<1> B(" bytes ")<1;1,0> %2:w\n"
  asm(MOE_XE_CODES MOE_XE_FOUR(MOE_XE_LINE) "}\n" : "=rw"(words) : "rw"(codes), "P"(by));
#undef MOE_XE_LINE
  return words;
}
[[gnu::always_inline]] inline vec<int32, 4> flip_signs(vec<int32, 2> codes) {
  vec<int32, 4> words;
#define MOE_XE_LINE(r, nibbles, bytes) "xor (M1_NM,32) T(" r ",0)<1> UB(" bytes ")<1;1,0> 0x80:uw\n"
  asm(MOE_XE_CODES MOE_XE_FOUR(MOE_XE_LINE) "}\n" : "=rw"(words) : "rw"(codes));
#undef MOE_XE_LINE
  return words;
}

// number ^ (word & 15)
template <int number> [[gnu::always_inline]] inline void join_nibbles(vec<int32, 4>& words) {
#define MOE_XE_LINE(r, nibbles, bytes) "bfn.x6A (M1_NM,32) T(" r ",0)<1> %1:uw T(" r ",0)<1;1,0> 0xF:uw\n"
  asm(MOE_XE_OPERAND MOE_XE_FOUR(MOE_XE_LINE) "}\n" : "+rw"(words) : "P"(number));
#undef MOE_XE_LINE
}
template <int by> [[gnu::always_inline]] inline void shift_right(vec<int32, 4>& words) {
#define MOE_XE_LINE(r, nibbles, bytes) "asr (M1_NM,32) TW(" r ",0)<1> TW(" r ",0)<1;1,0> %1:uw\n"
  asm(MOE_XE_OPERAND MOE_XE_FOUR(MOE_XE_LINE) "}\n" : "+rw"(words) : "P"(by));
#undef MOE_XE_LINE
}
template <int mask> [[gnu::always_inline]] inline void keep_bits(vec<int32, 4>& words) {
  asm(MOE_XE_OPERAND "and (M1_NM,32) TD(0,0)<1> TD(0,0)<1;1,0> %1:d\nand (M1_NM,32) TD(2,0)<1> TD(2,0)<1;1,0> %1:d\n}\n"
      : "+rw"(words) : "P"(int(mask * 0x10001u)));
}

// 8 rows' bits of numbers, which the factors (xe/factors.hpp) complete. Codes of 8 bits are 16 bytes a row, of 4 bits 8.
[[gnu::always_inline]] inline vec<int32, 4> spread(int32 codes) {
  vec<int32, 4> words;
  if constexpr (problem::codes == Codes::e2m1) {
    words = shift_nibbles_left(codes, 0x0008000C);
    shift_right<to_f16 ? 3 : 6>(words);
    keep_bits<to_f16 ? 0x8E00 : 0x81C0>(words);
  } else if constexpr (to_f16) {          // denormals: q / 2^24, of the upper code q / 2^20
    words = mask_nibbles(problem::codes == Codes::int4 ? codes ^ int32(0x88888888) : codes, 0x00F0000F);
  } else {                                // 128 + q
    words = shift_nibbles_right(codes, 0x00040000);
    join_nibbles<problem::codes == Codes::int4 ? 0x4308 : 0x4300>(words);
  }
  return words;
}
[[gnu::always_inline]] inline vec<int32, 4> spread(vec<int32, 2> codes) {
  if constexpr (problem::codes == Codes::int8) return flip_signs(codes);      // denormals: q / 2^24, or in bf16 q / 2^133
  vec<int32, 4> words = shift_bytes_left<to_f16 ? (problem::codes == Codes::e4m3 ? 7 : 8) : (problem::codes == Codes::e4m3 ? 4 : 5)>(codes);
  if constexpr (problem::codes == Codes::e4m3) keep_bits<to_f16 ? 0xBFFF : 0x87F0>(words);
  else if constexpr (!to_f16) keep_bits<0x8FE0>(words);
  return words;
}

// What the numbers of 16 rows of one group become weights by. bf16: a float for each row, weight = number * multiplier + addend. f16 has no
// such mixed instructions: factors lie in registers as operands do, weight = (number * 2^14 + addend) * multiplier, of integers; the upper
// one of two codes in a byte is 16 times as large, and its multiplier a 16th.
struct Bf16Factors {
  float multiplier, addend;
};
struct F16Factors {
  vec<int32, 8> multiplier, remainder;  // remainder: what f16 leaves of f32 scales, so that weights are rounded once
  vec<int32, 8> addend;                 // only the first register, if all rows have the same
};
inline constexpr bool has_remainders = problem::scale_type == ScaleType::f32;
using Factors = std::conditional_t<to_f16, F16Factors, Bf16Factors>;

#define MOE_XE_ROWS(line) line("0", "0", "0") line("0", "16", "1") line("1", "0", "2") line("1", "16", "3") line("2", "0", "4") \
  line("2", "16", "5") line("3", "0", "6") line("3", "16", "7")
// Rows 8 * `eight` and on of 16. A bf16 source of mad is the middle one: another IGC would widen before.
template <int eight> [[gnu::always_inline]] inline void complete(vec<int32, 4>& words, const Bf16Factors& factors) {
#define MOE_XE_S ".decl S v_type=G type=F num_elts=8 alias=<%1,%2>\n"
#define MOE_XE_MUL(r, h, i) "mul (M1_NM,16) BF(" r "," h ")<1> BF(" r "," h ")<1;1,0> S(0," i ")<0;1,0>\n"
#define MOE_XE_MAD(r, h, i) "mad (M1_NM,16) BF(" r "," h ")<1> S(0," i ")<0;1,0> BF(" r "," h ")<1;1,0> C(0," i ")<0;1,0>\n"
  if constexpr (integer_codes)
    asm(MOE_XE_OPERAND MOE_XE_S ".decl C v_type=G type=F num_elts=8 alias=<%3,%2>\n" MOE_XE_ROWS(MOE_XE_MAD) "}\n"
        : "+rw"(words) : "rw"(factors.multiplier), "P"(eight * 32), "rw"(factors.addend));
  else
    asm(MOE_XE_OPERAND MOE_XE_S MOE_XE_ROWS(MOE_XE_MUL) "}\n" : "+rw"(words) : "rw"(factors.multiplier), "P"(eight * 32));
#undef MOE_XE_MAD
#undef MOE_XE_MUL
#undef MOE_XE_S
}
template <int eight> [[gnu::always_inline]] inline void complete(vec<int32, 4>& words, const F16Factors& factors) {
#define MOE_XE_C ".decl C v_type=G type=HF num_elts=128 alias=<%1,0>\n"
#define MOE_XE_ADD(r, z) "mad (M1_NM,32) HF(" r ",0)<1> HF(" r ",0)<1;1,0> 0x7400:hf C(" z ",0)<1;1,0>\n"
#define MOE_XE_ADD_OWN(r, nibbles, bytes) MOE_XE_ADD(r, r)
#define MOE_XE_ADD_SAME(r, nibbles, bytes) MOE_XE_ADD(r, "0")
#define MOE_XE_MUL(r, nibbles, bytes) "mul (M1_NM,32) HF(" r ",0)<1> HF(" r ",0)<1;1,0> S(" r ",0)<1;1,0>\n"
#define MOE_XE_MUL_MAD(r, nibbles, bytes) "mul (M1_NM,32) PART(" r ",0)<1> HF(" r ",0)<1;1,0> SMALL(" r ",0)<1;1,0>\n" \
  "mad (M1_NM,32) HF(" r ",0)<1> HF(" r ",0)<1;1,0> S(" r ",0)<1;1,0> PART(" r ",0)<1;1,0>\n"
#define MOE_XE_256TH(r, nibbles, bytes) "mul (M1_NM,32) HF(" r ",0)<1> HF(" r ",0)<1;1,0> 0x1C00:hf\n"
  if constexpr (integer_codes && problem::has_zeros)
    asm(MOE_XE_OPERAND MOE_XE_C MOE_XE_FOUR(MOE_XE_ADD_OWN) "}\n" : "+rw"(words) : "rw"(slice<eight, 4>(factors.addend)));
  else if constexpr (integer_codes)
    asm(MOE_XE_OPERAND MOE_XE_C MOE_XE_FOUR(MOE_XE_ADD_SAME) "}\n" : "+rw"(words) : "rw"(int32(factors.addend[0])));
  else if constexpr (problem::codes == Codes::e5m2)
    asm(MOE_XE_OPERAND MOE_XE_FOUR(MOE_XE_256TH) "}\n" : "+rw"(words));
#define MOE_XE_S ".decl S v_type=G type=HF num_elts=128 alias=<%1,0>\n"
  if constexpr (has_remainders)
    asm(MOE_XE_OPERAND MOE_XE_S ".decl SMALL v_type=G type=HF num_elts=128 alias=<%2,0>\n.decl PART v_type=G type=HF num_elts=128\n"
        MOE_XE_FOUR(MOE_XE_MUL_MAD) "}\n"
        : "+rw"(words) : "rw"(slice<eight, 4>(factors.multiplier)), "rw"(slice<eight, 4>(factors.remainder)));
  else
    asm(MOE_XE_OPERAND MOE_XE_S MOE_XE_FOUR(MOE_XE_MUL) "}\n" : "+rw"(words) : "rw"(slice<eight, 4>(factors.multiplier)));
#undef MOE_XE_S
#undef MOE_XE_MUL_MAD
#undef MOE_XE_256TH
#undef MOE_XE_MUL
#undef MOE_XE_ADD_SAME
#undef MOE_XE_ADD_OWN
#undef MOE_XE_ADD
#undef MOE_XE_C
}

// A register of two f16 numbers a row -> 16 rows of an operand.
[[gnu::always_inline]] inline vec<int32, 8> along_rows(int32 pairs) {
  vec<int32, 8> rows;
#define MOE_XE_LINE(r, first) "mov (M1_NM,16) %0(" r ",0)<1> %1(0," first ")<1;8,0>\n"
  asm("{\n" MOE_XE_LINE("0", "0") MOE_XE_LINE("1", "2") MOE_XE_LINE("2", "4") MOE_XE_LINE("3", "6") MOE_XE_LINE("4", "8")
      MOE_XE_LINE("5", "10") MOE_XE_LINE("6", "12") MOE_XE_LINE("7", "14") "}\n" : "=rw"(rows) : "rw"(pairs));
#undef MOE_XE_LINE
  return rows;
}
inline int32 pair_of(float first, float second) {
  return __builtin_bit_cast(int32, vec<_Float16, 2>{_Float16(first), _Float16(second)});
}

// By how much the upper one of two codes is larger.
inline constexpr float upper_code = integer_codes && code_bits == 4 ? 16.0f : 1.0f;
inline int32 addends(float zero) {
  const float addend = (-code_origin - zero) * power_of_two(-10);
  return pair_of(addend, addend * upper_code);
}

// What stays through a tile: unknown, else each use would have a copy of its own.
[[gnu::always_inline]] inline void start(Bf16Factors&) {}
[[gnu::always_inline]] inline void start(F16Factors& factors) {
  if constexpr (integer_codes && !problem::has_zeros) factors.addend[0] = unknown(addends(problem::zero));
}
// Each lane has its row's scale and zero.
[[gnu::always_inline]] inline void set_factors(Bf16Factors& factors, float scale, float zero) {
  factors.multiplier = scale * power_of_two(code_shift() - sum_shift);
  if constexpr (integer_codes) {
    const float below = problem::codes == Codes::int8 ? code_origin : 128.0f + code_origin;
    factors.addend = scale * power_of_two(-sum_shift) * (-below - zero);
  }
}
[[gnu::always_inline]] inline void set_factors(F16Factors& factors, float scale, float zero) {
  const float multiplier = scale * power_of_two(code_shift() - sum_shift);
  factors.multiplier = along_rows(pair_of(multiplier, multiplier / upper_code));
  if constexpr (has_remainders) {
    const float remainder = multiplier - float(_Float16(multiplier));
    factors.remainder = along_rows(pair_of(remainder, remainder / upper_code));
  }
  if constexpr (integer_codes && problem::has_zeros) factors.addend = along_rows(addends(zero));
}

#undef MOE_XE_ROWS
#undef MOE_XE_OPERAND
#undef MOE_XE_FOUR
#undef MOE_XE_AND
#undef MOE_XE_SHR
#undef MOE_XE_SHL
#undef MOE_XE_NIBBLES
#undef MOE_XE_NIBBLE_LINE
#undef MOE_XE_CODES

}  // namespace moe_xe
