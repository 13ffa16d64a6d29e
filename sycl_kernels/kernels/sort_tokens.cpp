// Routed tokens become rows sorted by expert: rows per expert, and the pair and the scale of each row.
#if defined(MOE_XE_CPU)
#include <moe_xe/cpu/sort_tokens.hpp>
#else
#include <moe_xe/gpu/sort_tokens.hpp>
#endif

extern "C" MOE_XE_KERNEL_ATTRIBUTES void sort_tokens(
    const void* topk_ids, long topk_ids_stride, const int* expert_map, int expert_map_size, const void* weights,
    long weights_stride, const void* shared_weights, long shared_weights_stride, float routed_scaling_factor,
    int* tokens_per_expert, int* row_pairs, float* row_scales, int* queue_words, int num_queue_words, void* out,
    long out_stride, long out_row_bytes, int num_tokens, int num_experts) {
  using namespace moe_xe;
  moe_xe::sort_tokens({{static_cast<const problem::Id*>(topk_ids), topk_ids_stride, expert_map, expert_map_size}, weights,
                       weights_stride, shared_weights, shared_weights_stride, routed_scaling_factor, tokens_per_expert,
                       row_pairs, row_scales, queue_words, num_queue_words, static_cast<char*>(out), out_stride,
                       out_row_bytes, num_tokens, num_experts});
}
