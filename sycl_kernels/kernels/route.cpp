// The router: for each token the best experts and their weights.
#include <moe_xe/types.hpp>
#if defined(MOE_XE_CPU)
#include <moe_xe/cpu/lanes.hpp>
#else
#include <moe_xe/gpu/lanes.hpp>
#endif
#include <moe_xe/routing/route.hpp>

extern "C" MOE_XE_KERNEL_ATTRIBUTES void route(const void* logits, const void* correction_bias, float* topk_weights,
                                               void* topk_ids, long tokens, long logits_stride, float scaling_factor) {
  using namespace moe_xe;
  const Router router{static_cast<const Logit*>(logits), static_cast<const Bias*>(correction_bias), topk_weights,
                      static_cast<problem::ExpertId*>(topk_ids), logits_stride, scaling_factor};
  for_tokens(Team(), tokens, [&router](int64 token) { router.run(token); });
}
