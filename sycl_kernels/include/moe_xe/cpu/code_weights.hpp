// One expert's quantised weights, a vector at a time.
#pragma once
#include <moe_xe/cpu/codes.hpp>
#include <moe_xe/cpu/dense_weights.hpp>

namespace moe_xe {

class CodeWeights {
 public:
  static constexpr int chunk_elements = bf16_pairs ? 2 * width : width;
  static constexpr bool are_tiles = false;
  // Whether vectors that begin at a multiple of their width are of one group each. Others are read one weight after the other.
  static constexpr bool whole_vectors = grid_columns == 1 || problem::group_columns % width == 0;

  // A row of memory, and the scale and zero of the group that was read last; of [K, N] weights' columns the first row, and the index.
  struct Column {
    int64 index;
    const unsigned char *codes, *scales, *zeros;
    int64 group = -1;
    float scale, zero;
  };

  CodeWeights(const Arguments& args, int expert) : w(codes_of(args, expert)) {}

  Column column(int64 output, int part) const {
    if constexpr (rows_are_n) return line(weight_column(output, part));
    return {woven ? 2 * output : weight_column(output, part), w.codes, w.scales, w.zeros};
  }

  // [N, K] weights: a chunk along K, rounded to bf16 where the CPU multiplies pairs; of the second kind `left` elements exist.
  Dwords chunk(Column& column, int64 k) const {
    return chunk_of([&](int at) { return vector(column, k + at); });
  }
  Dwords chunk(const Column& column, int64 k, int left) const {
    return chunk_of([&](int at) { return some(column, k + at, left - at); });
  }

  // Whether a cache line of codes begins at k, as rows begin with one.
  static bool begins_line(int64 k) { return k * code_bits / 8 % 64 == 0; }
  void prefetch_ahead(const Column& column, int64 k) const {
    prefetch(column.codes + k * code_bits / 8 + bytes_of_columns(config::prefetch_columns));
  }
  int64 bytes_of_columns(int count) const { return count * (problem::pairs == Pairs::interleaved ? 2 * w.row_bytes : w.row_bytes); }

  // [K, N] weights: neighbours in row k; of the second kind `count` exist.
  bool has_whole_vectors(const Column& column) const { return whole_vectors && column.index % width == 0; }
  Floats neighbours(const Column& column, int64 k, int offset) const {
    Column row = line(k);
    return vector(row, column.index + offset);
  }
  Floats neighbours(const Column& column, int64 k, int offset, int count) const {
    if (count >= width && has_whole_vectors(column)) return neighbours(column, k, offset);
    return some(line(k), column.index + offset, count);
  }
  static Dwords pairs(Floats even, Floats odd) { return bf16_bits(even) | bf16_bits(odd) << 16; }
  void prefetch_row(const Column& column, int64 k, int offset) const {
    prefetch(w.codes + k * w.row_bytes + (column.index + offset) * code_bits / 8);
  }

  float global_scale() const { return w.global_scale; }

 private:
  Column line(int64 row) const {
    const int64 grid = row / problem::group_rows * grid_columns * size_of(problem::scale_type);
    return {row, w.codes + row * w.row_bytes, w.scales + grid, w.zeros + grid};
  }

  template <class Read> static Dwords chunk_of(Read read) {
    const Floats first = read(0);
    if constexpr (!bf16_pairs) return __builtin_bit_cast(Dwords, first);
    return rounded_pairs(first, read(width));
  }

  // `width` weights of a row, all of one group.
  Floats vector(Column& line, int64 column) const {
    const int64 group = column / problem::group_columns;
    if (line.group != group) {
      line.group = group;
      line.scale = grid_value(line.scales, group) * w.global_scale * code_unit;
      if constexpr (problem::has_zeros) line.zero = grid_value(line.zeros, group);
    }
    const Floats numbers = numbers_at(line.codes, column);
    if constexpr (problem::has_zeros) return (numbers - line.zero) * line.scale;
    return numbers * line.scale;
  }

  // One weight after the other, the first `count` of a vector.
  Floats some(const Column& line, int64 column, int count) const {
    float values[width] = {};
#pragma unroll 1
    for (int i = 0; i < width && i < count; ++i) values[i] = weight_at(w, line.index, column + i);
    return load<Floats>(values);
  }

  const ExpertCodes w;
};

}  // namespace moe_xe
