// Sums of products of int8 codes: dpas leaves int32 in the registers of floats.
#pragma once
#include <moe_xe/xe/feature_rows.hpp>

namespace moe_xe {

[[gnu::always_inline]] inline Wide floats_of_int32(vec<float, 8> sums) {
#define MOE_XE_LINE(r) "mov (M1_NM,32) %0(" r ",0)<1> WHOLE(" r ",0)<1;1,0>\n"
  Wide floats;
  asm("{\n.decl WHOLE v_type=G type=D num_elts=128 alias=<%1,0>\n" MOE_XE_LINE("0") MOE_XE_LINE("2") MOE_XE_LINE("4") MOE_XE_LINE("6") "}\n"
      : "=rw"(floats.values) : "rw"(sums));
  return floats;
#undef MOE_XE_LINE
}

// Times each token's scale, which is a lane's, and each feature's.
template <class Part, int rows, int columns>
[[gnu::always_inline]] inline void complete_int8_sums(const Arguments& args, const Tile& tile, int first_feature, int first_token, int lane,
                                                      vec<float, 8> (&sums)[rows][columns]) {
  const ExpertCodes codes = codes_of(args, tile.expert);
  float of_token[columns];
  for (int j = 0; j < columns; ++j) {
    const int row = first_token + j * 16 + lane;
    of_token[j] = a_scale_of(args, tile.row + (row < tile.rows ? row : tile.rows - 1));
  }
  unrolled<rows>([&](auto i) __attribute__((always_inline)) {
    const float of_feature = scale_at(codes, weight_row<Part>(tile, first_feature, i * 8 + lane % 8), 0);
    for (int j = 0; j < columns; ++j) {
      sums[i][j] = (floats_of_int32(sums[i][j]) * OfLanes(of_token[j])).values;
      unrolled<8>([&](auto r) __attribute__((always_inline)) {
        sums[i][j][int(r)] *= __spirv_GroupBroadcast(__spv::Scope::Subgroup, of_feature, unsigned(r));
      });
    }
  });
}

}  // namespace moe_xe
