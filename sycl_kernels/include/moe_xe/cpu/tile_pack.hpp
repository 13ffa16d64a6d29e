// Operands for AMX's tiles. [N, K] weights are the left operand, whose rows are theirs: they are read in place, or codes are
// unpacked into rows; tokens are the columns of the right one. [K, N] weights are the right operand, packed as panels (pack.hpp).
#pragma once
#include <moe_xe/cpu/pack.hpp>

namespace moe_xe {

constexpr bool tokens_are_columns = tiled && problem::weights == WeightLayout::enk;

// Up to 16 rows of A, each dword of a row under the one before; the others repeat the last one.
template <int side> void pack_columns(const Input* const (&from)[side], Packed* to) {
#pragma unroll 1
  for (int64 k = 0; k < problem::k; k += tile_k) {
    const int left = int(problem::k - k);
    Dwords rows[side];
    if (left >= tile_k) {
#pragma unroll
      for (int i = 0; i < side; ++i) rows[i] = load<Dwords>(from[i] + k);
    } else {
#pragma unroll 1
      for (int i = 0; i < side; ++i) rows[i] = load<Dwords>(Partial<Input, tile_k>(from[i] + k, left).element);
    }
    transpose(rows);
#pragma unroll
    for (int i = 0; i < side; ++i, to += side) store(to, rows[i]);
  }
}

// A block's rows of packed A from element k on; `packed` is its first row.
inline TilePair packed_rows(const Packed* packed, int64 k) {
  packed += k / elements_per_step * (tokens_are_columns ? tile_side : 1);
  const Packed* second = packed + tile_side * packed_stride;
  if constexpr (tokens_are_columns) return {packed, second, 4 * tile_side, 4 * tile_side * tile_side};
  return {packed, second, 4 * packed_stride, 4 * tile_side};
}

// W[n, k] as rows of a panel, a vector longer than they are: `depth` elements along K, from `first` on, of the panel's columns.
template <class Weights>
TilePair pack_weight_rows(const Weights& w, int64 output, int columns, int64 first, int depth, PackedVector* panel) {
  constexpr int outputs = paired ? tile_side : block_side;
  constexpr int row_vectors = int(k_block / tile_k) + 1;
#pragma unroll 1
  for (int i = 0; i < block_side; ++i) {
    const int wanted = i % outputs;
    typename Weights::Column column = w.column(output + (wanted < columns ? wanted : columns - 1), i / outputs);
    PackedVector* to = panel + i * row_vectors;
#pragma unroll 1
    for (int k = 0; k < depth; k += tile_k, ++to) {
      if (config::prefetch_columns > 0 && Weights::begins_line(first + k)) w.prefetch_ahead(column, first + k);
      *to = Weights::whole_vectors && depth - k >= tile_k ? w.chunk(column, first + k) : w.chunk(column, first + k, depth - k);
    }
  }
  return {panel, panel + tile_side * row_vectors, 64 * row_vectors, 64};
}

// W[k, n] as a panel of `depth` elements along K, with zeros up to a whole tile.
template <class Weights>
TilePair pack_weight_columns(const Weights& w, int64 output, int columns, int64 first, int depth, PackedVector* panel) {
  pack_panel_ekn(w, output, columns, first, depth, panel);
#pragma unroll 1
  for (int pair = (depth + 1) / 2; pair % tile_side > 0; ++pair)
#pragma unroll
    for (int v = 0; v < panel_vectors; ++v) panel[pair * panel_vectors + v] = 0u;
  return {panel, panel + 1, 64 * panel_vectors, 64 * panel_vectors * tile_side};
}

// A panel of weights as tiles, wherever they lie. ahead: how far behind it the next panel's are, or 0 where nobody should ask for them.
struct TilePanel {
  TilePair tiles;
  int64 ahead = 0;
};
template <class Weights>
TilePanel panel_tiles(const Weights& w, int64 output, int columns, int64 first, int depth, PackedVector* panel) {
  constexpr int outputs = paired ? tile_side : block_side;
  if constexpr (Weights::are_tiles)
    if (columns >= outputs) return {w.tiles_at(output, first), config::prefetch_columns > 0 ? w.bytes_of_columns(outputs) : 0};
  if constexpr (tokens_are_columns) return {pack_weight_rows(w, output, columns, first, depth, panel)};
  else return {pack_weight_columns(w, output, columns, first, depth, panel)};
}

}  // namespace moe_xe
