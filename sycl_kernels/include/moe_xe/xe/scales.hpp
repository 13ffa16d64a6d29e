// Scales (and zeros) of a sub-group's rows of codes, read where they lie: each lane reads its own row's, for 128 elements of K at once
// and as long before they are used.
#pragma once
#include <moe_xe/xe/factors.hpp>
#include <moe_xe/xe/k_loop.hpp>

namespace moe_xe {

inline constexpr int round_elements = unroll * step_elements;
inline constexpr int scale_bytes = size_of(problem::scale_type);
inline constexpr int grid_row_bytes = int(grid_columns) * scale_bytes;
inline constexpr int round_groups = round_elements > problem::group_columns ? round_elements / int(problem::group_columns) : 1;
inline constexpr int round_bytes = round_groups * scale_bytes;    // of one row

// Bytes that a lane loads at once: what begins and ends at a multiple of them in every row.
constexpr int piece_bytes() {
  for (int bytes = 4; bytes > scale_bytes; bytes /= 2)
    if (grid_row_bytes % bytes == 0 && round_bytes % bytes == 0) return bytes;
  return scale_bytes;
}
inline constexpr int round_pieces = round_bytes / piece_bytes();

// A scale of its bits.
inline float scale_of_bits(unsigned bits) {
  if constexpr (problem::scale_type == ScaleType::f32) return __builtin_bit_cast(float, bits);
  else if constexpr (problem::scale_type == ScaleType::f16) return float(__builtin_bit_cast(_Float16, static_cast<unsigned short>(bits)));
  else if constexpr (problem::scale_type == ScaleType::bf16) return __builtin_bit_cast(float, bits << 16);
  else if constexpr (problem::scale_type == ScaleType::e8m0) return __builtin_bit_cast(float, bits == 255 ? 0x7fc00000u : bits << 23);
  else return number_of<Codes::e4m3>(bits);
}

// Of one grid: what a lane has of its row in one round.
struct RoundScales {
  unsigned pieces[round_pieces];

  [[gnu::always_inline]] static RoundScales load(const unsigned char* row, int offset) {
    RoundScales loaded;
    unrolled<round_pieces>([&](auto i) __attribute__((always_inline)) {
      constexpr int last = grid_row_bytes - piece_bytes();       // pieces beyond the row are never used
      const int at = offset + i * piece_bytes();
      loaded.pieces[int(i)] = load_lane<piece_bytes()>(reinterpret_cast<int64>(row) + (at < last ? at : last));
    });
    return loaded;
  }
  template <int group> float value() const {
    constexpr int byte = group * scale_bytes;
    const unsigned piece = pieces[byte / piece_bytes()];
    if constexpr (piece_bytes() == scale_bytes) return scale_of_bits(piece);
    else return scale_of_bits(piece >> byte % piece_bytes() * 8 & (1u << scale_bytes * 8) - 1);
  }
};

// 16 rows of codes, one a lane.
class ScaledRows {
 public:
  ScaledRows() = default;
  [[gnu::always_inline]] ScaledRows(const ExpertCodes& codes, int row)
      : scales(codes.scales + row / int(problem::group_rows) * int64(grid_row_bytes)), zeros_away(codes.zeros - codes.scales) {
    start(factors);
  }

  // What was loaded last is for the round that begins; `offset` is of the one after it.
  [[gnu::always_inline]] void next_round(int offset) {
    scale = next_scale;
    zero = next_zero;
    load(offset);
  }
  [[gnu::always_inline]] void load(int offset) {
    next_scale = RoundScales::load(scales, offset);
    if constexpr (problem::has_zeros) next_zero = RoundScales::load(scales + zeros_away, offset);
  }
  template <int group> [[gnu::always_inline]] void begin_group() {
    set_factors(factors, scale.template value<group>(), problem::has_zeros ? zero.template value<group>() : problem::zero);
  }

  Factors factors;

 private:
  const unsigned char* scales;
  int64 zeros_away;
  RoundScales scale, zero, next_scale, next_zero;
};

}  // namespace moe_xe
