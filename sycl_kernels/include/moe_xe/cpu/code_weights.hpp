// One expert's quantised weights, a vector at a time.
#pragma once
#include <moe_xe/cpu/codes.hpp>
#include <moe_xe/cpu/dense_weights.hpp>

namespace moe_xe {

class CodeWeights {
 public:
  static constexpr int chunk_elements = bf16_pairs ? 2 * width : width;

  // A row of memory; of [K, N] weights' columns the first row, and the column's index.
  struct Column {
    int64 index;
    const unsigned char *codes, *scales, *zeros;
  };

  CodeWeights(const Arguments& args, int expert) : w(codes_of(args, expert)) {}

  Column column(int64 output, int part) const {
    if constexpr (rows_are_n) return line(weight_column(output, part));
    return {woven ? 2 * output : weight_column(output, part), w.codes, w.scales, w.zeros};
  }

  // [N, K] weights: a chunk along K, rounded to bf16 where the CPU multiplies pairs.
  Dwords chunk(const Column& column, int64 k, int left = chunk_elements) const {
    const Floats first = weights(column, k, left);
    if constexpr (!bf16_pairs) return __builtin_bit_cast(Dwords, first);
    else {
      const Floats second = weights(column, k + width, left - width);
      Dwords pairs;
      asm("vcvtne2ps2bf16 %2,%1,%0" : "=v"(pairs) : "v"(second), "v"(first));
      return pairs;
    }
  }
  void prefetch_ahead(const Column& column, int64 k) const {
    prefetch(column.codes + k * code_bits / 8 + config::prefetch_columns * line_step());
  }

  // [K, N] weights.
  Floats neighbours(const Column& column, int64 k, int offset, int count = width) const { return weights(line(k), column.index + offset, count); }
  static Dwords pairs(Floats even, Floats odd) { return bf16_bits(even) | bf16_bits(odd) << 16; }
  void prefetch_row(const Column& column, int64 k, int offset) const {
    prefetch(w.codes + k * w.row_bytes + (column.index + offset) * code_bits / 8);
  }

  // Bytes of codes between the rows of two output columns.
  int64 line_step() const { return problem::pairs == Pairs::interleaved ? 2 * w.row_bytes : w.row_bytes; }
  float global_scale() const { return w.global_scale; }

 private:
  Column line(int64 row) const {
    const int64 grid = row / problem::group_rows * grid_columns * size_of(problem::scale_type);
    return {row, w.codes + row * w.row_bytes, w.scales + grid, w.zeros + grid};
  }

  // `width` weights of a row from a column on, of which `count` exist. One by one where they are not of one group.
  Floats weights(const Column& line, int64 column, int count) const {
    constexpr bool aligned = rows_are_n && problem::group_columns % width == 0;
    const int64 group = column / problem::group_columns;
    if (count >= width && (aligned || group == (column + width - 1) / problem::group_columns) && (rows_are_n || code_bits == 8 || column % 2 == 0)) {
      Floats numbers = numbers_at(line.codes, column);
      if constexpr (problem::has_zeros) numbers -= grid_value(line.zeros, group);
      return numbers * (grid_value(line.scales, group) * w.global_scale);
    }
    float values[width] = {};
#pragma unroll 1
    for (int i = 0; i < width && i < count; ++i) values[i] = weight_at(w, line.index, column + i);
    return load<Floats>(values);
  }

  const ExpertCodes w;
};

}  // namespace moe_xe
