// Scales (and zeros) of rows of codes, read where they lie: each lane reads its own row's, as far along it as `span` codes, and as long
// before they are used.
#pragma once
#include <moe_xe/xe/factors.hpp>

namespace moe_xe {

inline constexpr int scale_bytes = size_of(problem::scale_type), grid_row_bytes = int(grid_columns) * scale_bytes;

// A scale of its bits.
inline float scale_of_bits(unsigned bits) {
  if constexpr (problem::scale_type == ScaleType::f32) return __builtin_bit_cast(float, bits);
  else if constexpr (problem::scale_type == ScaleType::f16) return float(__builtin_bit_cast(_Float16, static_cast<unsigned short>(bits)));
  else if constexpr (problem::scale_type == ScaleType::bf16) return __builtin_bit_cast(float, bits << 16);
  else if constexpr (problem::scale_type == ScaleType::e8m0) return __builtin_bit_cast(float, bits == 255 ? 0x7fc00000u : bits << 23);
  else return number_of<Codes::e4m3>(bits);
}

// What each lane has of its row of one grid: the scales of `span` codes.
template <int span> struct RowScales {
  static constexpr int groups = span > problem::group_columns ? span / int(problem::group_columns) : 1, bytes = groups * scale_bytes;

  // `offset`: bytes from the row's first scale. Pieces beyond the row are never used.
  [[gnu::always_inline]] void load(const unsigned char* row, int offset) {
    unrolled<bytes / piece>([&](auto i) __attribute__((always_inline)) {
      constexpr int last = grid_row_bytes - piece;
      const int at = offset + i * piece;
      pieces[int(i)] = load_lane<piece>(reinterpret_cast<int64>(row) + (at < last ? at : last));
    });
  }
  template <int group> float value() const {
    constexpr int byte = group * scale_bytes;
    const unsigned bits = pieces[byte / piece];
    if constexpr (piece == scale_bytes) return scale_of_bits(bits);
    else return scale_of_bits(bits >> byte % piece * 8 & (1u << scale_bytes * 8) - 1);
  }

 private:
  // Bytes of a message: what begins and ends at a multiple of them in every row.
  static constexpr int piece_bytes() {
    for (int size = 4; size > scale_bytes; size /= 2)
      if (grid_row_bytes % size == 0 && bytes % size == 0) return size;
    return scale_bytes;
  }
  static constexpr int piece = piece_bytes();
  unsigned pieces[bytes / piece];
};

// 16 rows of codes, one a lane.
template <int span> class ScaledRows {
 public:
  static constexpr int groups = RowScales<span>::groups;

  [[gnu::always_inline]] ScaledRows() { start(factors); }

  [[gnu::always_inline]] void go_to(const ExpertCodes& codes, int row) {
    const int64 away = row / int(problem::group_rows) * int64(grid_row_bytes);
    scale_row = codes.scales + away;
    zero_row = codes.zeros + away;
  }
  [[gnu::always_inline]] void load(int offset) {
    next_scale.load(scale_row, offset);
    if constexpr (problem::has_zeros) next_zero.load(zero_row, offset);
  }
  // What was loaded last is to be used.
  [[gnu::always_inline]] void take() {
    scale = next_scale;
    zero = next_zero;
  }
  template <int group> [[gnu::always_inline]] void begin_group() {
    set_factors(factors, scale.template value<group>(), problem::has_zeros ? zero.template value<group>() : problem::zero);
  }

  Factors factors;

 private:
  const unsigned char *scale_row, *zero_row;
  RowScales<span> scale, zero, next_scale, next_zero;
};

}  // namespace moe_xe
