// A column of weights on any SYCL GPU, one element of K after the other: dense ones or codes.
#pragma once
#include <moe_xe/operands/expert_codes.hpp>
#include <type_traits>

namespace moe_xe {

// Dense: a pointer that walks along K, as products of 64-bit strides would fill registers.
class DenseColumns {
 public:
  using Column = const Element<problem::input>*;

  DenseColumns(const Arguments& args, int expert)
      : weights(weights_of(args, expert)), step(weights.column_step()), k_stride(rows_are_n ? 1 : weights.row_stride) {}

  // The weights of an output column, or of its pair, from element k of K on.
  Column column(int64 output, int part, int64 k) const { return (part == 0 ? weights.gate : weights.up) + output * step + k * k_stride; }
  float next(Column& at) const {
    const Input value = alone(*at);
    at += k_stride;
    return widened<problem::input>(value);
  }

 private:
  using Input = Element<problem::input>;
  // Volatile for 16-bit elements: IGC joins neighbours to 32-bit messages, which an odd stride would misalign.
  using Alone = std::conditional_t<sizeof(Input) == 2, const volatile Input, const Input>;
  static Input alone(Alone& element) { return element; }

  const ExpertWeights weights;
  const int64 step, k_stride;
};

class CodeColumns {
 public:
  struct Column {
    int n, k;
  };

  CodeColumns(const Arguments& args, int expert) : codes(codes_of(args, expert)) {}

  Column column(int64 output, int part, int64 k) const { return {int(weight_column(output, part)), int(k)}; }
  float next(Column& at) const {
    const int k = at.k++;
    return rows_are_n ? weight_at(codes, at.n, k) : weight_at(codes, k, at.n);
  }

 private:
  const ExpertCodes codes;
};

using WeightColumns = std::conditional_t<quantised, CodeColumns, DenseColumns>;
using WeightColumn = WeightColumns::Column;

}  // namespace moe_xe
