// Int8 codes that are multiplied as such: dwords of consecutive ones along K, and the scales that complete int32 sums.
#pragma once
#include <moe_xe/cpu/code_weights.hpp>

namespace moe_xe {

constexpr int int8_elements = elements_per_step * width;    // of a vector

// Codes as 16-bit integers, or as they are.
inline Dwords int8_chunk(const void* codes) {
  if constexpr (int8_quads) return load<Dwords>(codes);
  else {
    const auto bytes = load<Several<signed char, 2 * width>>(codes);
    return __builtin_bit_cast(Dwords, __builtin_convertvector(bytes, Several<short, 2 * width>));
  }
}
// Of the first `left`; then zeros.
inline Dwords int8_chunk(const void* codes, int left) {
  if (left >= int8_elements) return int8_chunk(codes);
  return int8_chunk(Partial<unsigned char, int8_elements>(static_cast<const unsigned char*>(codes), left).element);
}

// Whether quads of weights are 128 larger than they are: vectors' instruction has one unsigned operand, that of tiles has none.
constexpr bool int8_shifted = int8_quads && !tiled;
class Int8Weights : public CodeWeights {
 public:
  static constexpr int chunk_elements = int8_elements;
  static constexpr bool whole_vectors = true;
  using CodeWeights::CodeWeights;

  static Dwords chunk(const Column& column, int64 k) { return shifted(int8_chunk(column.codes + k)); }
  static Dwords chunk(const Column& column, int64 k, int left) { return shifted(int8_chunk(column.codes + k, left)); }

  // As tiles, where all of the panel's columns exist.
  static constexpr bool are_tiles = tiled && problem::k % tile_k == 0;
  TilePair tiles_at(int64 output, int64 k) const {
    const Column first = column(output, 0), second = paired ? column(output, 1) : column(output + tile_side, 0);
    return {first.codes + k, second.codes + k, bytes_of_columns(1), 4 * tile_side};
  }

  float scale(const Column& column) const { return grid_value(column.scales, 0) * global_scale(); }

 private:
  static Dwords shifted(Dwords codes) { return int8_shifted ? codes ^ 0x80808080u : codes; }
};

// By what a row's sums are too large: 128 times the sum of its codes.
inline int int8_excess(const Packed* row) {
  if constexpr (!int8_shifted) return 0;
  Sums sums = 0;
#pragma unroll 1
  for (int64 k = 0; k < problem::k; k += int8_elements)
    asm("vpdpbusd %2,%3,%0" : "=v"(sums) : "0"(sums), "v"(load<Dwords>(row + k / elements_per_step)), "v"(Dwords(0x80808080u)));
  int excess = 0;
#pragma unroll
  for (int i = 0; i < width; ++i) excess += sums[i];
  return excess;
}

}  // namespace moe_xe
