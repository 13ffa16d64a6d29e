// Packing: rows of A and panels of W as fp32 (or as the pairs or quads that the CPU multiplies), in the order in which
// the micro-kernel reads them. Gathering tokens, widening, transposition and all tails of K and N happen here.
#pragma once
#include <moe_xe/cpu/int8_weights.hpp>

namespace moe_xe {

using Weights = std::conditional_t<int8_steps, Int8Weights, std::conditional_t<quantised, CodeWeights, DenseWeights>>;

// Elements along K that one load of a dword vector brings, and the packed vectors they become.
constexpr int chunk = Weights::chunk_elements;
constexpr int chunk_vectors = chunk / (elements_per_step * width);

// Weights that are read in place come in runs of up to so many elements (cpu/spans.hpp).
constexpr int64 padded_k = round_up(problem::k, 8 * width);
constexpr int64 k_block = config::k_block < padded_k ? config::k_block : padded_k;
// Rows of packed A are 64 bytes more apart than they are long: a power of two would map all rows to the same cache sets.
constexpr int64 packed_k = padded_k / elements_per_step, packed_stride = packed_k + 16;

// Vector i holds the elements chunk_vectors * lane + i of the chunk.
inline PackedVector packed(Dwords raw, int i) {
  if constexpr (chunk_vectors == 2) return __builtin_bit_cast(PackedVector, i == 0 ? raw << 16 : raw & 0xffff0000u);
  else return __builtin_bit_cast(PackedVector, raw);
}

inline void pack_row(const Input* from, Packed* to) {
  constexpr int unit = elements_per_step * width;
#pragma unroll 1
  for (int64 k = 0; k < problem::k; k += unit) {
    const int left = int(problem::k - k);
    if constexpr (int8_steps) store(to + k / elements_per_step, int8_chunk(from + k, left));
    else if constexpr (float_pairs) store(to + k / 2, DenseWeights::chunk(from, k, left));
    else store(to + k, load_floats<problem::input>(from + k, left));
  }
  if constexpr (int8_shifted) to[packed_k] = Packed(int8_excess(to));
}

// Vectors [0, gate_vectors) of a panel hold gates (or plain columns, or woven pairs), the others their up values.
constexpr int gate_vectors = paired && !woven ? panel_vectors / 2 : panel_vectors;

// The columns of a vector of a panel; those that do not exist repeat the last one.
inline void columns_of(const Weights& w, int64 output, int columns, int v, Weights::Column (&column)[width]) {
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const int wanted = v % gate_vectors * width + i;
    column[i] = w.column(output + (wanted < columns ? wanted : columns - 1), v < gate_vectors ? 0 : 1);
  }
}

// W[n, k]: `depth` elements along K, from `first` on, of the panel's output columns from `output` on, of which `columns` exist.
inline void pack_panel_enk(const Weights& w, int64 output, int columns, int64 first, int depth, PackedVector* panel) {
#pragma unroll 1
  for (int v = 0; v < panel_vectors; ++v) {
    Weights::Column column[width];
    columns_of(w, output, columns, v, column);
    PackedVector* to = panel + v;
#pragma unroll 1
    for (int k = 0; k < depth; k += chunk) {
      Dwords raw[width];
      if (config::prefetch_columns > 0 && Weights::begins_line(first + k))
#pragma unroll
        for (int i = 0; i < width; ++i) w.prefetch_ahead(column[i], first + k);
      if (Weights::whole_vectors && depth - k >= chunk) {
#pragma unroll
        for (int i = 0; i < width; ++i) raw[i] = w.chunk(column[i], first + k);
      } else {
#pragma unroll 1
        for (int i = 0; i < width; ++i) raw[i] = w.chunk(column[i], first + k, depth - k);
      }
      transpose(raw);
#pragma unroll
      for (int i = 0; i < width; ++i)
#pragma unroll
        for (int half = 0; half < chunk_vectors; ++half) {
          *to = packed(raw[i], half);
          to += panel_vectors;
        }
    }
  }
}

// W[k, n]: `depth` rows of W from `first` on, `columns` of each (two weights a column, if they are woven).
inline void pack_panel_ekn(const Weights& w, int64 output, int columns, int64 first, int depth, PackedVector* panel) {
  if constexpr (woven) columns *= 2;
  const Weights::Column gate = w.column(output, 0), up = paired ? w.column(output, 1) : gate;
#pragma unroll 1
  for (int k = 0; k < depth; k += elements_per_step) {
#pragma unroll
    for (int v = 0; v < panel_vectors; ++v) {
      const int offset = v % gate_vectors * width, count = columns - offset;
      const Weights::Column from = v < gate_vectors ? gate : up;
      const Floats weights = w.neighbours(from, first + k, offset, count);
      if constexpr (float_pairs) {
        Floats odd = 0.f;
        if (k + 1 < depth) odd = w.neighbours(from, first + k + 1, offset, count);
        panel[v] = __builtin_bit_cast(PackedVector, Weights::pairs(weights, odd));
      } else {
        panel[v] = __builtin_bit_cast(PackedVector, weights);
      }
    }
    panel += panel_vectors;
  }
}

}  // namespace moe_xe
