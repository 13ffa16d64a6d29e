// One expert's weights as they lie in memory, a vector at a time.
#pragma once
#include <moe_xe/operands/expert_weights.hpp>
#include <moe_xe/cpu/tile_kernel.hpp>

namespace moe_xe {

class DenseWeights {
 public:
  // Elements along K of a chunk: of as many as a dword vector holds.
  static constexpr int chunk_elements = problem::input == Dtype::bf16 || f16_pairs ? 2 * width : width;
  static constexpr bool whole_vectors = true;
  using Column = const Input*;

  DenseWeights(const Arguments& args, int expert) : w(weights_of(args, expert)), step(w.column_step()) {}

  // The weights of an output column, or of its pair.
  Column column(int64 output, int part) const { return (part == 0 ? w.gate : w.up) + output * step; }

  // [N, K] weights: a chunk along K, of which `left` elements exist. bf16 stays two to a dword, so that a transposition moves two
  // elements; fp16 is widened first, but for tiles.
  static Dwords chunk(Column column, int64 k) { return chunk_at(column + k); }
  static Dwords chunk(Column column, int64 k, int left) {
    if (left >= chunk_elements) return chunk_at(column + k);
    return chunk_at(Partial<Input, chunk_elements>(column + k, left).element);
  }
  static bool begins_line(int64) { return true; }
  void prefetch_ahead(Column column, int64 k) const { prefetch(column + k + config::prefetch_columns * step); }

  // [N, K] weights as tiles, where all of the panel's columns exist.
  static constexpr bool are_tiles = tiled && problem::weights == WeightLayout::enk && problem::k % tile_k == 0;
  TilePair tiles_at(int64 output, int64 k) const {
    return {column(output, 0) + k, (paired ? column(output, 1) : column(output + tile_side, 0)) + k, step * int64(sizeof(Input)), 4 * tile_side};
  }
  int64 bytes_of_columns(int count) const { return count * step * int64(sizeof(Input)); }

  // [K, N] weights: neighbours in row k, from so many weights behind a column on, of which `count` exist.
  static bool has_whole_vectors(Column) { return true; }
  Floats neighbours(Column column, int64 k, int offset) const { return load_floats<problem::input>(column + k * w.row_stride + offset); }
  Floats neighbours(Column column, int64 k, int offset, int count) const {
    return load_floats<problem::input>(column + k * w.row_stride + offset, count);
  }
  static Dwords pairs(Floats even, Floats odd) { return pairs_of(even, odd); }
  void prefetch_row(Column column, int64 k, int offset) const { prefetch(column + k * w.row_stride + offset); }

 private:
  static Dwords chunk_at(const Input* from) {
    if constexpr (problem::input == Dtype::f16 && !f16_pairs) return __builtin_bit_cast(Dwords, load_floats<Dtype::f16>(from));
    else return load<Dwords>(from);
  }

  const ExpertWeights w;
  const int64 step;
};

}  // namespace moe_xe
