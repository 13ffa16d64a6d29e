// Sums of products of int8 codes: dpas leaves int32 in the registers of floats.
#pragma once
#include <moe_xe/xe/feature_rows.hpp>

namespace moe_xe {

// As floats, times each lane's number and each register's, which are in the first eight lanes of `of_registers`.
[[gnu::always_inline]] inline void scale_int32(vec<float, 8>& sums, OfLanes of_lanes, float of_registers) {
#define MOE_XE_LINE(r)                                                             \
  "mov (M1_NM,32) %0(" r ",0)<1> WHOLE(" r ",0)<1;1,0>\n"                          \
  "mul (M1_NM,32) %0(" r ",0)<1> %0(" r ",0)<1;1,0> %1(0,0)<1;1,0>\n"              \
  "mul (M1_NM,32) %0(" r ",0)<1> %0(" r ",0)<1;1,0> %2(0," r ")<1;16,0>\n"
  asm("{\n.decl WHOLE v_type=G type=D num_elts=128 alias=<%0,0>\n" MOE_XE_LINE("0") MOE_XE_LINE("2") MOE_XE_LINE("4") MOE_XE_LINE("6") "}\n"
      : "+rw"(sums) : "rw"(of_lanes.twice), "rw"(of_registers));
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
    for (int j = 0; j < columns; ++j) scale_int32(sums[i][j], OfLanes(of_token[j]), of_feature);
  });
}

}  // namespace moe_xe
