// Codes to dpas operands A: 8 rows of 16 weights in the activations' type, rows 2r and 2r + 1 in register r. Here bits are moved until a
// 16-bit number has the code's value times a power of two, or an integer above it; factors.hpp has what completes it. Each line of text
// is one instruction. Some numbers are below the normal ones (denormals), which these instructions keep in the mode that kernels are
// compiled for; forms without them take more.
#pragma once
#include <moe_xe/xe/atoms.hpp>
#include <moe_xe/operands/expert_codes.hpp>

namespace moe_xe {

inline constexpr bool to_f16 = problem::input == Dtype::f16;
inline constexpr bool integer_codes = problem::codes == Codes::int4 || problem::codes == Codes::uint4 || problem::codes == Codes::int8;

#define MOE_XE_FOUR(line) line("0", "0,0", "0,0") line("1", "0,16", "0,32") line("2", "0,32", "1,0") line("3", "0,48", "1,32")
#define MOE_XE_WORDS                                                                                           \
  "{\n.decl T v_type=G type=UW num_elts=128 alias=<%0,0>\n.decl TW v_type=G type=W num_elts=128 alias=<%0,0>\n" \
  ".decl TD v_type=G type=D num_elts=64 alias=<%0,0>\n"
#define MOE_XE_CODES MOE_XE_WORDS                                                                              \
  ".decl B v_type=G type=B num_elts=128 alias=<%1,0>\n.decl UB v_type=G type=UB num_elts=128 alias=<%1,0>\n"

// Two lanes read each byte, and treat it by a half of `by` each, the lower half for the lower code.
#define MOE_XE_NIBBLES(op, r, nibbles) op " (M1_NM,32) T(" r ",0)<1> UB(" nibbles ")<1;2,0> BY(0,0)<0;2,1>\n"
#define MOE_XE_SHL(r, nibbles, bytes) MOE_XE_NIBBLES("shl", r, nibbles)
#define MOE_XE_SHR(r, nibbles, bytes) MOE_XE_NIBBLES("shr", r, nibbles)
#define MOE_XE_AND(r, nibbles, bytes) MOE_XE_NIBBLES("and", r, nibbles)
#define MOE_XE_WIDEN_NIBBLES(line)                                                                             \
  vec<int32, 4> words;                                                                                         \
  asm(MOE_XE_CODES ".decl BY v_type=G type=UW num_elts=2 alias=<%2,0>\n" MOE_XE_FOUR(line) "}\n"                \
      : "=rw"(words) : "rw"(codes), "rw.u"(by));                                                               \
  return words
[[gnu::always_inline]] inline vec<int32, 4> shift_nibbles_left(int32 codes, int by) { MOE_XE_WIDEN_NIBBLES(MOE_XE_SHL); }
[[gnu::always_inline]] inline vec<int32, 4> shift_nibbles_right(int32 codes, int by) { MOE_XE_WIDEN_NIBBLES(MOE_XE_SHR); }
[[gnu::always_inline]] inline vec<int32, 4> mask_nibbles(int32 codes, int by) { MOE_XE_WIDEN_NIBBLES(MOE_XE_AND); }

// Bytes with their sign, shifted; and from 0 to 255, the sign flipped.
#define MOE_XE_SHL_BYTES(r, nibbles, bytes) "shl (M1_NM,32) TW(" r ",0)<1> B(" bytes ")<1;1,0> %2:w\n"
#define MOE_XE_FLIP_BYTES(r, nibbles, bytes) "xor (M1_NM,32) T(" r ",0)<1> UB(" bytes ")<1;1,0> 0x80:uw\n"
template <int by> [[gnu::always_inline]] inline vec<int32, 4> shift_bytes_left(vec<int32, 2> codes) {
  vec<int32, 4> words;
  asm(MOE_XE_CODES MOE_XE_FOUR(MOE_XE_SHL_BYTES) "}\n" : "=rw"(words) : "rw"(codes), "P"(by));
  return words;
}
[[gnu::always_inline]] inline vec<int32, 4> flip_signs(vec<int32, 2> codes) {
  vec<int32, 4> words;
  asm(MOE_XE_CODES MOE_XE_FOUR(MOE_XE_FLIP_BYTES) "}\n" : "=rw"(words) : "rw"(codes));
  return words;
}

// number ^ (word & 15); and what else happens to words in place.
#define MOE_XE_JOIN(r, nibbles, bytes) "bfn.x6A (M1_NM,32) T(" r ",0)<1> %1:uw T(" r ",0)<1;1,0> 0xF:uw\n"
#define MOE_XE_ASR(r, nibbles, bytes) "asr (M1_NM,32) TW(" r ",0)<1> TW(" r ",0)<1;1,0> %1:uw\n"
template <int number> [[gnu::always_inline]] inline void join_nibbles(vec<int32, 4>& words) {
  asm(MOE_XE_WORDS MOE_XE_FOUR(MOE_XE_JOIN) "}\n" : "+rw"(words) : "P"(number));
}
template <int by> [[gnu::always_inline]] inline void shift_right(vec<int32, 4>& words) {
  asm(MOE_XE_WORDS MOE_XE_FOUR(MOE_XE_ASR) "}\n" : "+rw"(words) : "P"(by));
}
template <unsigned mask> [[gnu::always_inline]] inline void keep_bits(vec<int32, 4>& words) {
  asm(MOE_XE_WORDS "and (M1_NM,32) TD(0,0)<1> TD(0,0)<1;1,0> %1:d\nand (M1_NM,32) TD(2,0)<1> TD(2,0)<1;1,0> %1:d\n}\n"
      : "+rw"(words) : "P"(int(mask * 0x10001)));
}

// Codes are 8 rows of 8 bytes (4-bit ones) or of 16. e4m3's NaN becomes 480 here, e5m2's infinity and NaN in bf16 65536 and more.
[[gnu::always_inline]] inline vec<int32, 4> spread(int32 codes) {
  vec<int32, 4> words;
  if constexpr (problem::codes == Codes::e2m1) {      // value / 2^14, in bf16 / 2^126
    words = shift_nibbles_left(codes, 0x0008000C);
    shift_right<to_f16 ? 3 : 6>(words);
    keep_bits<to_f16 ? 0x8E00 : 0x81C0>(words);
  } else if constexpr (to_f16) {                      // q / 2^24, of the upper code in a byte q / 2^20
    words = mask_nibbles(problem::codes == Codes::int4 ? codes ^ int32(0x88888888) : codes, 0x00F0000F);
  } else {                                            // 128 + q
    words = shift_nibbles_right(codes, 0x00040000);
    join_nibbles<problem::codes == Codes::int4 ? 0x4308 : 0x4300>(words);
  }
  return words;
}
[[gnu::always_inline]] inline vec<int32, 4> spread(vec<int32, 2> codes) {
  constexpr bool e4m3 = problem::codes == Codes::e4m3;
  if constexpr (problem::codes == Codes::int8) return flip_signs(codes);      // q / 2^24, in bf16 / 2^133
  // e4m3: value / 2^8, in bf16 / 2^120; e5m2: value, in bf16 / 2^112
  vec<int32, 4> words = shift_bytes_left<to_f16 ? (e4m3 ? 7 : 8) : (e4m3 ? 4 : 5)>(codes);
  if constexpr (e4m3) keep_bits<to_f16 ? 0xBFFF : 0x87F0>(words);
  else if constexpr (!to_f16) keep_bits<0x8FE0>(words);
  return words;
}

#undef MOE_XE_ASR
#undef MOE_XE_JOIN
#undef MOE_XE_FLIP_BYTES
#undef MOE_XE_SHL_BYTES
#undef MOE_XE_WIDEN_NIBBLES
#undef MOE_XE_AND
#undef MOE_XE_SHR
#undef MOE_XE_SHL
#undef MOE_XE_NIBBLES
#undef MOE_XE_CODES
#undef MOE_XE_WORDS
#undef MOE_XE_FOUR

}  // namespace moe_xe
