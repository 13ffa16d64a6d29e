// What the token sort writes: the routed rows one at a time, and all that needs no sorting.
#pragma once
#include <moe_xe/routing/expert_ids.hpp>
#include <moe_xe/scalar.hpp>

namespace moe_xe {

struct SortArguments {
  ExpertIds ids;
  const void* weights;          // [tokens, top_k] or null: 1
  int64 weights_stride;         // elements between rows
  const void* shared_weights;   // [tokens, num_shared] or null: 1
  int64 shared_weights_stride;
  float routed_scaling_factor;
  int32* tokens_per_expert;     // [num_shared + num_experts]
  int32* row_pairs;             // [tokens * slots], and so is row_scales
  float* row_scales;
  int32* queue_words;         // [num_queue_words], becomes zero
  int32 num_queue_words;
  char* out;                    // [tokens, out_row_bytes]
  int64 out_stride;             // bytes between rows
  int64 out_row_bytes;
  int32 num_tokens;
  int32 num_experts;
};

template <Dtype dtype> float weight_at(const void* weights, int64 index) {
  return widened<dtype>(static_cast<const Element<dtype>*>(weights)[index]);
}

// The routed rows begin behind those of the shared experts.
inline int first_routed_row(const SortArguments& args) { return args.num_tokens * problem::num_shared; }

inline float routed_scale(const SortArguments& args, int token, int slot) {
  float scale = args.routed_scaling_factor;
  if constexpr (problem::has_weights) scale *= weight_at<problem::weights>(args.weights, token * args.weights_stride + slot);
  return scale;
}

// What lies beyond the last row, `first` on.
inline void clear_unused(const SortArguments& args, int first, int worker, int workers) {
  for (int row = first + worker; row < args.num_tokens * slots; row += workers) {
    args.row_pairs[row] = -1;
    args.row_scales[row] = 0.f;
  }
}

// Counters, and the groups of the shared experts, each of which has every token; spread over `workers`.
inline void place_shared(const SortArguments& args, int worker, int workers) {
  for (int i = worker; i < args.num_queue_words; i += workers) args.queue_words[i] = 0;
  for (int i = worker; i < problem::num_shared; i += workers) args.tokens_per_expert[i] = args.num_tokens;
#pragma unroll 1
  for (int shared = 0; shared < problem::num_shared; ++shared)
    for (int token = worker; token < args.num_tokens; token += workers) {
      float scale = 1.f;
      if constexpr (problem::has_shared_weights)
        scale = weight_at<problem::shared_weights>(args.shared_weights, token * args.shared_weights_stride + shared);
      const int row = shared * args.num_tokens + token;
      args.row_pairs[row] = token * slots + problem::top_k + shared;
      args.row_scales[row] = scale;
    }
}

static_assert(problem::zero_access == 0 || slots == 1);
using ZeroAccess = unsigned short __attribute__((ext_vector_type(problem::zero_access > 0 ? problem::zero_access / 2 : 1)));

// Rows of `out` that nobody else writes: those of dropped tokens. A worker is `lanes` lanes that share a row.
inline void zero_dropped_rows(const SortArguments& args, int worker, int workers, int lane, int lanes) {
  if constexpr (problem::zero_access > 0)
    for (int token = worker; token < args.num_tokens; token += workers) {
      if (args.ids.expert_of(token, 0) < unsigned(args.num_experts)) continue;
      auto* row = reinterpret_cast<ZeroAccess*>(args.out + token * args.out_stride);
      for (int64 i = lane; i < args.out_row_bytes / int64(sizeof(ZeroAccess)); i += lanes) row[i] = ZeroAccess(0);
    }
}

}  // namespace moe_xe
