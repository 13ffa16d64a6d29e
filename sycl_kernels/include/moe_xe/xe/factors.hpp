// What makes weights of the numbers that codes were spread to (convert.hpp): a group's scale and zero, and powers of two. The result is
// rounded once.
#pragma once
#include <moe_xe/xe/convert.hpp>
#include <moe_xe/xe/wide.hpp>

namespace moe_xe {

// Integers count from 0, signed ones with their sign flipped: where 0 is then.
inline constexpr float code_origin = problem::codes == Codes::int4 ? 8.0f : problem::codes == Codes::int8 ? 128.0f : 0.0f;
// By how much the upper one of two spread codes in a byte is larger.
inline constexpr float upper_code = to_f16 && integer_codes && code_bits == 4 ? 16.0f : 1.0f;

constexpr float power_of_two(int exponent) {
  float power = 1.0f;
  for (int i = 0; i < exponent; ++i) power *= 2.0f;
  for (int i = 0; i > exponent; --i) power *= 0.5f;
  return power;
}

// log2 of what spread codes lack.
constexpr int code_shift() {
  switch (problem::codes) {
    case Codes::e2m1: return to_f16 ? 14 : 126;
    case Codes::int8: return to_f16 ? 10 : 133;
    case Codes::e4m3: return to_f16 ? 8 : 120;
    case Codes::e5m2: return to_f16 ? 8 : 112;
    default: return to_f16 ? 10 : 0;
  }
}
// Operands are weights / 2^sum_shift, where a scale times 2^code_shift would be no number, and sums are multiplied by it. Scales are
// below 2^(16 - code_shift + sum_shift) in f16, 2^(128 - code_shift + sum_shift) in bf16: larger ones give infinities and NaN. In bf16
// weights below 2^-94 may become zeros, in f16 those of e2m1 below 2^-18.
inline constexpr int sum_shift = to_f16 ? (problem::codes != Codes::e2m1 ? 0 : problem::scale_type == ScaleType::e4m3 ? 10 : 6)
                                        : (code_shift() == 0 ? 0 : 32);
inline constexpr bool scales_sums = converts && (sum_shift != 0 || problem::has_global_scales);

// Of 16 rows. bf16: each row's float, weight = number * multiplier + addend. f16 has no such mixed instructions: factors lie in registers as
// operands do, weight = number * multiplier, of integers (number * 2^14 + addend) * multiplier.
struct Bf16Factors {
  float multiplier, addend;
};
struct F16Factors {
  vec<int32, 8> multiplier, remainder;  // remainder: what f16 leaves of a float32 multiplier
  vec<int32, 8> addend;                 // only the first register, if all rows have the same
};
using Factors = std::conditional_t<to_f16, F16Factors, Bf16Factors>;
inline constexpr bool has_remainders = to_f16 && problem::scale_type == ScaleType::f32;

#define MOE_XE_OPERAND "{\n.decl BF v_type=G type=BF num_elts=128 alias=<%0,0>\n.decl HF v_type=G type=HF num_elts=128 alias=<%0,0>\n"
#define MOE_XE_ROWS(line) line("0", "0", "0", "0") line("0", "1", "16", "1") line("1", "0", "0", "2") line("1", "1", "16", "3") \
  line("2", "0", "0", "4") line("2", "1", "16", "5") line("3", "0", "0", "6") line("3", "1", "16", "7")
#define MOE_XE_REGISTERS(line) line("0") line("1") line("2") line("3")

// Rows 8 * `eight` and on. A bf16 source of mad is the middle one: another would be widened before.
#define MOE_XE_MUL_ROW(r, odd, h, i) "mul (M1_NM,16) BF(" r "," h ")<1> BF(" r "," h ")<1;1,0> S(0," i ")<0;1,0>\n"
#define MOE_XE_MAD_ROW(r, odd, h, i) "mad (M1_NM,16) BF(" r "," h ")<1> S(0," i ")<0;1,0> BF(" r "," h ")<1;1,0> C(0," i ")<0;1,0>\n"
#define MOE_XE_FLOATS(name, of, at) ".decl " name " v_type=G type=F num_elts=8 alias=<" of "," at ">\n"
template <int eight> [[gnu::always_inline]] inline void complete(vec<int32, 4>& words, const Bf16Factors& factors) {
  if constexpr (integer_codes)
    asm(MOE_XE_OPERAND MOE_XE_FLOATS("S", "%1", "%2") MOE_XE_FLOATS("C", "%3", "%2") MOE_XE_ROWS(MOE_XE_MAD_ROW) "}\n"
        : "+rw"(words) : "rw"(factors.multiplier), "P"(eight * 32), "rw"(factors.addend));
  else
    asm(MOE_XE_OPERAND MOE_XE_FLOATS("S", "%1", "%2") MOE_XE_ROWS(MOE_XE_MUL_ROW) "}\n"
        : "+rw"(words) : "rw"(factors.multiplier), "P"(eight * 32));
}
#undef MOE_XE_MAD_ROW
#undef MOE_XE_MUL_ROW

#define MOE_XE_X(r) "HF(" r ",0)<1> HF(" r ",0)<1;1,0> "
#define MOE_XE_ADD(r) "mad (M1_NM,32) " MOE_XE_X(r) "0x7400:hf S(" r ",0)<1;1,0>\n"
#define MOE_XE_ADD_SAME(r) "mad (M1_NM,32) " MOE_XE_X(r) "0x7400:hf S(0,0)<1;1,0>\n"
#define MOE_XE_MUL_256TH(r) "mul (M1_NM,32) " MOE_XE_X(r) "0x1C00:hf\n"
#define MOE_XE_MUL_REGISTER(r) "mul (M1_NM,32) " MOE_XE_X(r) "S(" r ",0)<1;1,0>\n"
#define MOE_XE_MUL_BOTH(r) "mul (M1_NM,32) SMALL(" r ",0)<1> HF(" r ",0)<1;1,0> R(" r ",0)<1;1,0>\n" \
  "mad (M1_NM,32) " MOE_XE_X(r) "S(" r ",0)<1;1,0> SMALL(" r ",0)<1;1,0>\n"
#define MOE_XE_S ".decl S v_type=G type=HF num_elts=128 alias=<%1,0>\n"
template <int eight> [[gnu::always_inline]] inline void complete(vec<int32, 4>& words, const F16Factors& factors) {
  if constexpr (integer_codes && problem::has_zeros)
    asm(MOE_XE_OPERAND MOE_XE_S MOE_XE_REGISTERS(MOE_XE_ADD) "}\n" : "+rw"(words) : "rw"(slice<eight, 4>(factors.addend)));
  else if constexpr (integer_codes)
    asm(MOE_XE_OPERAND MOE_XE_S MOE_XE_REGISTERS(MOE_XE_ADD_SAME) "}\n" : "+rw"(words) : "rw"(int32(factors.addend[0])));
  else if constexpr (problem::codes == Codes::e5m2)
    asm(MOE_XE_OPERAND MOE_XE_REGISTERS(MOE_XE_MUL_256TH) "}\n" : "+rw"(words));
  const vec<int32, 4> multiplier = slice<eight, 4>(factors.multiplier);
  if constexpr (has_remainders)
    asm(MOE_XE_OPERAND MOE_XE_S ".decl R v_type=G type=HF num_elts=128 alias=<%2,0>\n.decl SMALL v_type=G type=HF num_elts=128\n"
        MOE_XE_REGISTERS(MOE_XE_MUL_BOTH) "}\n" : "+rw"(words) : "rw"(multiplier), "rw"(slice<eight, 4>(factors.remainder)));
  else
    asm(MOE_XE_OPERAND MOE_XE_S MOE_XE_REGISTERS(MOE_XE_MUL_REGISTER) "}\n" : "+rw"(words) : "rw"(multiplier));
}
#undef MOE_XE_S
#undef MOE_XE_MUL_BOTH
#undef MOE_XE_MUL_REGISTER
#undef MOE_XE_MUL_256TH
#undef MOE_XE_ADD_SAME
#undef MOE_XE_ADD
#undef MOE_XE_X

// 16 rows as dpas operand B: pairs of rows interleave, which costs bf16 nothing. No instruction writes a whole register, so that the
// compiler must be told where the operand's life begins.
#define MOE_XE_COLUMNS(type)                                                                                                     \
  "{\n.decl OUT0 v_type=G type=" type " num_elts=128 alias=<%0,0>\n.decl OUT1 v_type=G type=" type " num_elts=128 alias=<%0,256>\n" \
  ".decl X0 v_type=G type=" type " num_elts=128 alias=<%1,0>\n.decl X1 v_type=G type=" type " num_elts=128 alias=<%2,0>\n"          \
  "lifetime.start %0\n"
#define MOE_XE_TWO(name, of) MOE_XE_FLOATS(name "0", of, "0") MOE_XE_FLOATS(name "1", of, "32")
#define MOE_XE_MUL_TO(n, r, odd, h, i) "mul (M1_NM,16) OUT" n "(" r "," odd ")<2> X" n "(" r "," h ")<1;1,0> S" n "(0," i ")<0;1,0>\n"
#define MOE_XE_MAD_TO(n, r, odd, h, i) \
  "mad (M1_NM,16) OUT" n "(" r "," odd ")<2> S" n "(0," i ")<0;1,0> X" n "(" r "," h ")<1;1,0> C" n "(0," i ")<0;1,0>\n"
#define MOE_XE_MOV_TO(n, r, odd, h, i) "mov (M1_NM,16) OUT" n "(" r "," odd ")<2> X" n "(" r "," h ")<1;1,0>\n"
#define MOE_XE_MUL_ROW(...) MOE_XE_MUL_TO("0", __VA_ARGS__) MOE_XE_MUL_TO("1", __VA_ARGS__)
#define MOE_XE_MAD_ROW(...) MOE_XE_MAD_TO("0", __VA_ARGS__) MOE_XE_MAD_TO("1", __VA_ARGS__)
#define MOE_XE_MOV_ROW(...) MOE_XE_MOV_TO("0", __VA_ARGS__) MOE_XE_MOV_TO("1", __VA_ARGS__)
[[gnu::always_inline]] inline vec<int32, 8> completed_columns(vec<int32, 4> first, vec<int32, 4> second, const Bf16Factors& factors) {
  vec<int32, 8> columns;
  if constexpr (integer_codes)
    asm(MOE_XE_COLUMNS("BF") MOE_XE_TWO("S", "%3") MOE_XE_TWO("C", "%4") MOE_XE_ROWS(MOE_XE_MAD_ROW) "}\n"
        : "=rw"(columns) : "rw"(first), "rw"(second), "rw"(factors.multiplier), "rw"(factors.addend));
  else
    asm(MOE_XE_COLUMNS("BF") MOE_XE_TWO("S", "%3") MOE_XE_ROWS(MOE_XE_MUL_ROW) "}\n"
        : "=rw"(columns) : "rw"(first), "rw"(second), "rw"(factors.multiplier));
  return columns;
}
[[gnu::always_inline]] inline vec<int32, 8> completed_columns(vec<int32, 4> first, vec<int32, 4> second, const F16Factors& factors) {
  complete<0>(first, factors);
  complete<1>(second, factors);
  vec<int32, 8> columns;
  asm(MOE_XE_COLUMNS("UW") MOE_XE_ROWS(MOE_XE_MOV_ROW) "}\n" : "=rw"(columns) : "rw"(first), "rw"(second));
  return columns;
}
#undef MOE_XE_MOV_ROW
#undef MOE_XE_MAD_ROW
#undef MOE_XE_MUL_ROW
#undef MOE_XE_MOV_TO
#undef MOE_XE_MAD_TO
#undef MOE_XE_MUL_TO
#undef MOE_XE_TWO
#undef MOE_XE_FLOATS
#undef MOE_XE_COLUMNS
#undef MOE_XE_REGISTERS
#undef MOE_XE_ROWS
#undef MOE_XE_OPERAND

// What operands lack, and the expert's scale.
template <int rows, int columns>
[[gnu::always_inline]] inline void complete_sums(const Arguments& args, const Tile& tile, vec<float, 8> (&sums)[rows][columns]) {
  float factor = power_of_two(sum_shift);
  if constexpr (problem::has_global_scales) factor *= args.global_scales[tile.expert];
  for (auto& blocks : sums)
    for (auto& block : blocks) block = (Wide{block} * factor).values;
}

// Of the lower and the upper code in a byte.
inline int32 pair_of(float lower, float upper) { return __builtin_bit_cast(int32, vec<_Float16, 2>{_Float16(lower), _Float16(upper)}); }

// Each lane's row has these: all 16 rows as operands have them.
[[gnu::always_inline]] inline vec<int32, 8> along_rows(float lower, float upper) {
  const int32 pairs = pair_of(lower, upper);
  vec<int32, 8> rows;
#define MOE_XE_LINE(r, first) "mov (M1_NM,16) %0(" r ",0)<1> %1(0," first ")<1;8,0>\n"
  asm("{\n" MOE_XE_LINE("0", "0") MOE_XE_LINE("1", "2") MOE_XE_LINE("2", "4") MOE_XE_LINE("3", "6") MOE_XE_LINE("4", "8")
      MOE_XE_LINE("5", "10") MOE_XE_LINE("6", "12") MOE_XE_LINE("7", "14") "}\n" : "=rw"(rows) : "rw"(pairs));
#undef MOE_XE_LINE
  return rows;
}

inline float addend_of(float zero) { return (-code_origin - zero) * power_of_two(-10); }

// Before a tile: what does not change. Unknown, else each use would have a copy of its own.
[[gnu::always_inline]] inline void start(Bf16Factors&) {}
[[gnu::always_inline]] inline void start(F16Factors& factors) {
  const float addend = addend_of(problem::zero);
  if constexpr (integer_codes && !problem::has_zeros) factors.addend[0] = unknown(pair_of(addend, addend * upper_code));
}

// For a group: each lane has its row's scale and zero.
[[gnu::always_inline]] inline void set_factors(Bf16Factors& factors, float scale, float zero) {
  factors.multiplier = scale * power_of_two(code_shift() - sum_shift);
  if constexpr (integer_codes) {
    const float below = code_bits == 8 ? code_origin : 128.0f + code_origin;
    factors.addend = scale * power_of_two(-sum_shift) * (-below - zero);
  }
}
[[gnu::always_inline]] inline void set_factors(F16Factors& factors, float scale, float zero) {
  const float multiplier = scale * power_of_two(code_shift() - sum_shift);
  factors.multiplier = along_rows(multiplier, multiplier / upper_code);
  if constexpr (has_remainders) {
    const float remainder = multiplier - float(_Float16(multiplier));
    factors.remainder = along_rows(remainder, remainder / upper_code);
  }
  if constexpr (integer_codes && problem::has_zeros) factors.addend = along_rows(addend_of(zero), addend_of(zero) * upper_code);
}

}  // namespace moe_xe
