// FP8 codes that are no numbers, of which convert.hpp makes numbers: e4m3's NaN and, beside bf16, e5m2's NaN and infinity. Whether there are
// any is noticed as codes pass, with two instructions an operand; where there are, a sub-group looks its codes through once more at the
// tile's end, and the sums that they belong to become NaN.
#pragma once
#include <moe_xe/xe/convert.hpp>

namespace moe_xe {

inline constexpr bool watches_codes =
    !problem::finite_codes && (problem::codes == Codes::e4m3 || (problem::codes == Codes::e5m2 && !to_f16));

struct NoNumbers {
  // Added to the size of a code, 7 bits: 128 or more if it is no number.
  static constexpr int least = problem::codes == Codes::e4m3 ? 1 : 4;
  vec<int32, 2> seen = 0;      // bit 7 of a byte

  // A sum that carries into the next byte has found one before.
  [[gnu::always_inline]] void watch(vec<int32, 2> codes) {
    asm("{\n.decl T v_type=G type=D num_elts=32\n.decl C v_type=G type=D num_elts=32 alias=<%1,0>\n"
        ".decl SEEN v_type=G type=D num_elts=32 alias=<%0,0>\nadd (M1_NM,32) T(0,0)<1> C(0,0)<1;1,0> %2:d\n"
        "bfn.xBE (M1_NM,32) SEEN(0,0)<1> SEEN(0,0)<1;1,0> C(0,0)<1;1,0> T(0,0)<1;1,0>\n}\n"
        : "+rw"(seen) : "rw"(codes), "P"(least * 0x01010101));
  }
  [[gnu::always_inline]] bool any() const {
    return __spirv_GroupAny(__spv::Scope::Subgroup, ((seen[0] | seen[1]) & int(0x80808080)) != 0);
  }
  // What a lane's output is to be multiplied with: NaN if one of its codes is no number. `feature`: of n.
  static float factor_of(const ExpertCodes& w, int feature) {
    bool found = false;
#pragma unroll 1
    for (int k = 0; k < int(problem::k); ++k) {
      const unsigned code = rows_are_n ? code_at(w, feature, k) : code_at(w, k, feature);
      found |= (code & 0x7f) + least >= 0x80;
    }
    return found ? __builtin_nanf("") : 1.0f;
  }
};

}  // namespace moe_xe
