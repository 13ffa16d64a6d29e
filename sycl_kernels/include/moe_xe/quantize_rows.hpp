// Rows as int8 codes with a scale each: a row's largest magnitude is 127.
#pragma once
#include <moe_xe/scalar.hpp>
#if defined(MOE_XE_CPU)
#include <moe_xe/cpu/activate.hpp>
#else
#include <moe_xe/gpu/activate.hpp>
#endif

namespace moe_xe {

struct QuantizeRowsArguments {
  const Element<problem::input>* x;   // [rows, K]
  int64 x_stride;                     // elements between rows
  signed char* codes;                 // [rows, K]
  int64 codes_stride;
  float* scales;                      // [rows]
};

inline void quantize_row(const QuantizeRowsArguments& args, const Team& team, int64 row) {
  const auto* x = args.x + row * args.x_stride;
  // Magnitudes compare as their bits do, NaN as the largest. A row of zeros has a scale, too, whose inverse is finite.
  Dwords magnitudes = __builtin_bit_cast(unsigned, 0x1p-100f);
  for_columns(team, [&](int column, int count) __attribute__((always_inline)) {
    const Dwords bits = __builtin_bit_cast(Dwords, load_floats<problem::input>(x + column, count)) & 0x7fffffffu;
    magnitudes = bits > magnitudes ? bits : magnitudes;
  });
  const float largest = __builtin_bit_cast(float, greatest(team, magnitudes)), factor = 127.0f / largest;
  if (team.leads()) args.scales[row] = largest / 127.0f;
  for_columns(team, [&](int column, int count) __attribute__((always_inline)) {
    store_codes(args.codes + row * args.codes_stride + column, Math::whole(load_floats<problem::input>(x + column, count) * factor), count);
  });
}

}  // namespace moe_xe
