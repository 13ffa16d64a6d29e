// out[t] = the sum of the rows of y that the token's experts wrote, rounded once.
#include <moe_xe/routing/combine.hpp>

extern "C" MOE_XE_KERNEL_ATTRIBUTES void combine(
    const void* y, long y_stride, const void* topk_ids, long topk_ids_stride, const int* expert_map, int expert_map_size,
    void* out, long out_stride, int num_tokens, int num_experts) {
  using namespace moe_xe;
  moe_xe::combine({static_cast<const Element<problem::input>*>(y), y_stride,
                   {static_cast<const problem::Id*>(topk_ids), topk_ids_stride, expert_map, expert_map_size},
                   static_cast<Element<problem::output>*>(out), out_stride, num_tokens, num_experts});
}
