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

template <Dtype dtype> using Columns = Element<dtype> __attribute__((ext_vector_type(problem::columns)));

// A piece of the work is a token, or a part of its columns; a work-group does it at once.
constexpr int pieces_of_token = config::row_groups;

inline void combine_piece(const CombineArguments& args, const Team& team, int piece) {
  const int token = piece / pieces_of_token, part = piece % pieces_of_token;
  const int lane = (part * int(__spirv_BuiltInNumSubgroups()) + team.sub_group) * Team::lanes + team.lane();
  const int column = lane * problem::columns;
  if (column >= problem::hidden_size) return;
  float sums[problem::columns] = {};
#pragma unroll 16
  for (int slot = 0; slot < slots; ++slot) {
    // a dropped slot reads the first slot's row once more and adds nothing: without a branch, all loads are in flight
    const bool adds = args.has(token, slot);
    const auto values = *reinterpret_cast<const Columns<problem::input>*>(args.row(token, adds ? slot : 0) + column);
#pragma unroll
    for (int i = 0; i < problem::columns; ++i) sums[i] += adds ? widened<problem::input>(values[i]) : 0.f;
  }
  Columns<problem::output> rounded_sums;
#pragma unroll
  for (int i = 0; i < problem::columns; ++i) rounded_sums[i] = rounded<problem::output>(sums[i]);
  *reinterpret_cast<Columns<problem::output>*>(args.out + token * args.out_stride + column) = rounded_sums;
}

inline void combine(const CombineArguments& args) {
  const Team team;
  combine_piece(args, team, team.group);
}

#endif

}  // namespace moe_xe
