// Packing: rows of A and panels of W as fp32 (or, where the CPU multiplies bf16 pairs, as pairs), in the order in which
// the micro-kernel reads them. Gathering tokens, widening, transposition and all tails of K and N happen here.
#pragma once
#include <moe_xe/operands/expert_weights.hpp>
#include <moe_xe/cpu/micro_kernel.hpp>

namespace moe_xe {

// Elements along K that one load of a dword vector brings, and the packed vectors they become.
constexpr int chunk = problem::input == Dtype::bf16 ? 2 * width : width;
constexpr int chunk_vectors = chunk / (elements_per_step * width);

constexpr int64 padded_k = round_up(problem::k, chunk);
// Rows of packed A are 64 bytes more apart than they are long: a power of two would map all rows to the same cache sets.
constexpr int64 packed_stride = padded_k / elements_per_step + 16;

// bf16 stays two to a dword, so that a transposition moves two elements; fp16 is widened first.
inline Dwords load_chunk(const Input* from) {
  if constexpr (problem::input == Dtype::f16) return __builtin_bit_cast(Dwords, load_floats<Dtype::f16>(from));
  else return load<Dwords>(from);
}
inline Dwords load_chunk(const Input* from, int count) {
  if (count >= chunk) return load_chunk(from);
  return load_chunk(Partial<Input, chunk>(from, count).element);
}
// Vector i holds the elements chunk_vectors * lane + i of the chunk.
inline PackedVector packed(Dwords raw, int i) {
  if constexpr (chunk_vectors == 2) return __builtin_bit_cast(PackedVector, i == 0 ? raw << 16 : raw & 0xffff0000u);
  else return __builtin_bit_cast(PackedVector, raw);
}

inline void pack_row(const Input* from, Packed* to) {
  constexpr int unit = bf16_pairs ? chunk : width;
#pragma unroll 1
  for (int64 k = 0; k < problem::k; k += unit) {
    const int left = int(problem::k - k);
    if constexpr (bf16_pairs) store(to + k / 2, load_chunk(from + k, left));
    else store(to + k, load_floats<problem::input>(from + k, left));
  }
}

inline void prefetch(const void* address) { asm volatile("prefetcht1 (%0)" : : "r"(address)); }

// Vectors [0, gate_vectors) of a panel hold gates (or plain columns, or woven pairs), the others their up values.
constexpr int gate_vectors = paired && !woven ? panel_vectors / 2 : panel_vectors;

// First element of the weights of a panel's column `i` of vector `v`; `columns` exist, those beyond repeat the last one.
inline const Input* panel_column(const ExpertWeights& w, int64 step, int v, int i, int columns) {
  const int column = v % gate_vectors * width + i;
  return (v < gate_vectors ? w.gate : w.up) + (column < columns ? column : columns - 1) * step;
}

// W[n, k]: `depth` elements along K of the panel's columns.
inline void pack_panel_enk(const ExpertWeights& w, int columns, int depth, PackedVector* panel) {
  const int64 step = w.column_step();
#pragma unroll 1
  for (int v = 0; v < panel_vectors; ++v) {
    const Input* column[width];
#pragma unroll
    for (int i = 0; i < width; ++i) column[i] = panel_column(w, step, v, i, columns);
    PackedVector* to = panel + v;
#pragma unroll 1
    for (int k = 0; k < depth; k += chunk) {
      Dwords raw[width];
      if (depth - k >= chunk) {
#pragma unroll
        for (int i = 0; i < width; ++i) {
          raw[i] = load_chunk(column[i] + k);
          if constexpr (config::prefetch_columns > 0) prefetch(column[i] + k + config::prefetch_columns * step);
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < width; ++i) raw[i] = load_chunk(column[i] + k, depth - k);
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

// W[k, n]: `depth` rows of W, `columns` of each (two weights a column, if they are woven).
inline void pack_panel_ekn(const ExpertWeights& w, int columns, int depth, PackedVector* panel) {
  if constexpr (woven) columns *= 2;
#pragma unroll 1
  for (int k = 0; k < depth; k += elements_per_step) {
#pragma unroll
    for (int v = 0; v < panel_vectors; ++v) {
      const int column = v % gate_vectors * width, count = columns - column;
      const Input* from = (v < gate_vectors ? w.gate : w.up) + k * w.row_stride + column;
      if constexpr (bf16_pairs) {
        const Dwords even = __builtin_bit_cast(Dwords, load_floats<problem::input>(from, count));
        Dwords odd = 0u;
        if (k + 1 < depth) odd = __builtin_bit_cast(Dwords, load_floats<problem::input>(from + w.row_stride, count));
        panel[v] = __builtin_bit_cast(PackedVector, even >> 16 | odd);
      } else {
        panel[v] = __builtin_bit_cast(PackedVector, load_floats<problem::input>(from, count));
      }
    }
    panel += panel_vectors;
  }
}

}  // namespace moe_xe
