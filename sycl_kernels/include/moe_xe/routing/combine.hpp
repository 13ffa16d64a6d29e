// The experts' results of each token summed in fp32, in the order of its slots, and rounded once.
#pragma once
#include <moe_xe/routing/expert_ids.hpp>
#if defined(MOE_XE_CPU)
#include <moe_xe/cpu/team.hpp>
#include <moe_xe/cpu/vector.hpp>
#else
#include <moe_xe/scalar.hpp>
#include <moe_xe/gpu/team.hpp>
#endif

namespace moe_xe {

struct CombineArguments {
  const Element<problem::input>* y;   // [tokens * slots, hidden_size]; rows of dropped pairs hold anything
  int64 y_stride;                     // elements between rows
  ExpertIds ids;
  Element<problem::output>* out;      // [tokens, hidden_size]
  int64 out_stride;
  int32 num_tokens;
  int32 num_experts;

  bool has(int64 token, int slot) const {
    return slot >= problem::top_k || ids.expert_of(token, slot) < unsigned(num_experts);
  }
  const Element<problem::input>* row(int64 token, int slot) const { return y + (token * slots + slot) * y_stride; }
};

#if defined(MOE_XE_CPU)

using Rows = const Element<problem::input>* [slots];

inline void combine_vector(const Rows& rows, int count, int column, Element<problem::output>* out) {
  Floats sum = 0.f;
  for (int i = 0; i < count; ++i) sum += load_floats<problem::input>(rows[i] + column);
  store_rounded<problem::output>(out + column, sum);
}

inline void combine_token(const Rows& rows, int count, Element<problem::output>* out) {
  constexpr int whole = problem::hidden_size / width * width;
  for (int column = 0; column < whole; column += width) combine_vector(rows, count, column, out);
  if constexpr (whole == problem::hidden_size) return;
  if constexpr (whole > 0) return combine_vector(rows, count, problem::hidden_size - width, out);   // some columns twice
#pragma unroll 1
  for (int column = 0; column < problem::hidden_size; ++column) {
    float sum = 0.f;
    for (int i = 0; i < count; ++i) sum += widened<problem::input>(rows[i][column]);
    out[column] = rounded<problem::output>(sum);
  }
}

// A piece of the work is a token.
constexpr int pieces_of_token = 1;

inline void combine_piece(const CombineArguments& args, const Team&, int token) {
  Rows rows;
  int count = 0;
  for (int slot = 0; slot < slots; ++slot)
    if (args.has(token, slot)) rows[count++] = args.row(token, slot);
  combine_token(rows, count, args.out + token * args.out_stride);
}

inline void combine(const CombineArguments& args) {
  const Team team;
  const int begin = int(int64(args.num_tokens) * team.group / team.num_groups);
  const int end = int(int64(args.num_tokens) * (team.group + 1) / team.num_groups);
  for (int token = begin; token < end; ++token) combine_piece(args, team, token);
}

#else

// A lane's columns of a row: elements as they lie in memory, and the same bits in the widest unit that all of them fill.
constexpr int lane_bytes = problem::columns * int(sizeof(Element<problem::input>));
template <class T, int count> using Vector = T __attribute__((ext_vector_type(count)));
using Columns = Vector<Element<problem::input>, problem::columns>;
using Unit = std::conditional_t<lane_bytes % 4 == 0, unsigned, unsigned short>;
using Units = Vector<Unit, lane_bytes / int(sizeof(Unit))>;

inline float column_of(Units units, int i) {
  if constexpr (problem::input == Dtype::bf16 && sizeof(Unit) == 4)   // half a word: one instruction each
    return __builtin_bit_cast(float, i % 2 ? units[i / 2] & 0xffff0000u : units[i / 2] << 16);
  else return widened<problem::input>(__builtin_bit_cast(Columns, units)[i]);
}

// A lane's sums, as many at once as problem::stored says; those beyond the last column are left out. Single elements are
// volatile, as they would else be joined to wider stores that the address is not aligned for.
inline void store_columns(const float (&sums)[problem::columns], Element<problem::output>* row, int column) {
  using Stored = std::conditional_t<problem::stored == 1, volatile Element<problem::output>,
                                    Vector<Element<problem::output>, problem::stored>>;
#pragma unroll
  for (int first = 0; first < problem::columns; first += problem::stored) {
    Vector<Element<problem::output>, problem::stored> values;
#pragma unroll
    for (int i = 0; i < problem::stored; ++i) values[i] = rounded<problem::output>(sums[first + i]);
    if (problem::hidden_size % problem::columns != 0 && column + first >= problem::hidden_size) continue;
    *reinterpret_cast<Stored*>(row + column + first) = __builtin_bit_cast(std::remove_cv_t<Stored>, values);
  }
}

// A piece of the work is a token, or a part of its columns; a work-group does it at once.
constexpr int pieces_of_token = config::row_groups;

inline void combine_piece(const CombineArguments& args, const Team& team, int piece) {
  const int token = piece / pieces_of_token, part = piece % pieces_of_token;
  const int lane = (part * int(__spirv_BuiltInNumSubgroups()) + team.sub_group) * Team::lanes + team.lane();
  const int column = lane * problem::columns;
  if (column >= problem::hidden_size) return;
  std::conditional_t<(problem::top_k > 32), unsigned long, unsigned> dropped = 0;   // a bit for each routed slot
  int64 some_row = problem::num_shared > 0 ? problem::top_k * args.y_stride : 0, next_row = 0;
#pragma unroll
  for (int slot = 0; slot < problem::top_k; ++slot, next_row += args.y_stride)
    if (args.has(token, slot)) some_row = next_row;
    else dropped |= decltype(dropped)(1) << slot;
  const Element<problem::input>* row = args.row(token, 0) + column;
  const Element<problem::input>* const read_anyway = row + some_row;
  float sums[problem::columns] = {};
#pragma unroll 16
  for (int slot = 0; slot < slots; ++slot, row += args.y_stride) {
    // a dropped slot reads a row that is read anyway, and adds nothing: without a branch, all loads are in flight
    const bool drops = slot < problem::top_k && (dropped >> slot & 1);
    const Units values = *reinterpret_cast<const Units*>(drops ? read_anyway : row);
    const Units added = drops ? Units(0) : values;
#pragma unroll
    for (int i = 0; i < problem::columns; ++i) sums[i] += column_of(added, i);
  }
  store_columns(sums, args.out + token * args.out_stride, column);
}

inline void combine(const CombineArguments& args) {
  const Team team;
  combine_piece(args, team, team.group);
}

#endif

}  // namespace moe_xe
