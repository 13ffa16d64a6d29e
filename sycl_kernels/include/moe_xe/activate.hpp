// Rows of z: their activations and the gradients through them, in one pass over memory.
#pragma once
#include <moe_xe/activation_grad.hpp>
#if defined(MOE_XE_CPU)
#include <moe_xe/cpu/activate.hpp>
#else
#include <moe_xe/gpu/activate.hpp>
#endif

namespace moe_xe {

struct ActivateArguments {
  const Element<problem::z>* z;   // [rows, 2I] where columns are pairs, else [rows, I]
  int64 z_stride;                 // elements between rows
  const Element<problem::g>* g;   // [rows, I] or null
  int64 g_stride;
  const float* row_scales;        // [rows] or null
  const int32* row_pairs;         // [rows] or null; negative: an unused row
  Element<problem::dz>* dz;       // as z, or null; may be z itself
  int64 dz_stride;
  Element<problem::hs>* hs;       // [rows, I] or null; may be g itself
  int64 hs_stride;
  float* dscale;                  // [rows] or null
};

constexpr int intermediate_size = problem::row_size;
constexpr bool paired = problem::pairs != Pairs::none, woven = problem::pairs == Pairs::interleaved;

struct Columns {
  Floats gate, up;
};

// Columns from `column` on, of which `count` exist; the others are zero.
template <Dtype dtype> Columns load_columns(const Element<dtype>* row, int column, int count) {
  Columns result;
  if constexpr (woven) {
    const Floats low = load_floats<dtype>(row + 2 * column, 2 * count);
    const Floats high = load_floats<dtype>(row + 2 * column + width, 2 * count - width);
    unweave(low, high, result.gate, result.up);
  } else {
    result.gate = load_floats<dtype>(row + column, count);
    if constexpr (paired) result.up = load_floats<dtype>(row + intermediate_size + column, count);
  }
  return result;
}

template <Dtype dtype> void store_columns(Element<dtype>* row, int column, int count, const Columns& values) {
  if constexpr (woven) {
    Floats low, high;
    weave(values.gate, values.up, low, high);
    store_rounded<dtype>(row + 2 * column, low, 2 * count);
    store_rounded<dtype>(row + 2 * column + width, high, 2 * count - width);
  } else {
    store_rounded<dtype>(row + column, values.gate, count);
    if constexpr (paired) store_rounded<dtype>(row + intermediate_size + column, values.up, count);
  }
}

inline Floats activated_columns(const Columns& z) {
  if constexpr (paired) return activated<Math>(z.gate, z.up);
  else return activated<Math>(z.gate);
}

inline Columns gradient_columns(const Columns& z, Floats factor) {
  if constexpr (paired) {
    const auto [gate, up] = gradient<Math>(z.gate, z.up, factor);
    return {gate, up};
  } else {
    return {factor * slope<Math>(z.gate)};
  }
}

inline void activate_row(const ActivateArguments& args, const Team& team, int64 row) {
  if constexpr (problem::has_row_pairs)
    if (args.row_pairs[row] < 0) {
      if constexpr (problem::has_dscale) args.dscale[row] = 0.0f;
      return;
    }
  float scale = 1.0f;
  if constexpr (problem::has_row_scales) scale = args.row_scales[row];
  Floats dscale = 0.0f;
  for_columns(team, [&](int column, int count) __attribute__((always_inline)) {
    const Columns z = load_columns<problem::z>(args.z + row * args.z_stride, column, count);
    Floats g = 0.0f;
    if constexpr (problem::has_dz || problem::has_dscale)
      g = load_floats<problem::g>(args.g + row * args.g_stride + column, count);
    const Floats h = activated_columns(z);
    if constexpr (problem::has_hs)
      store_rounded<problem::hs>(args.hs + row * args.hs_stride + column, h * scale, count);
    if constexpr (problem::has_dz)
      store_columns<problem::dz>(args.dz + row * args.dz_stride, column, count, gradient_columns(z, g * scale));
    if constexpr (problem::has_dscale) dscale += g * h;
  });
  if constexpr (problem::has_dscale) store_sum(team, dscale, args.dscale + row);
}

}  // namespace moe_xe
