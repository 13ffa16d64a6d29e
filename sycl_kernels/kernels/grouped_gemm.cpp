// The persistent MoE GEMM: every work-group takes tiles of all experts from one queue until it is empty.
#include <moe_xe/types.hpp>
#include <moe_xe/queue/tile_queue.hpp>
#if defined(MOE_XE_CPU)
#include <moe_xe/cpu/team.hpp>
#include <moe_xe/cpu/mainloop.hpp>
#elif defined(MOE_XE_XE)
#include <moe_xe/gpu/team.hpp>
#include <moe_xe/xe/mainloop.hpp>
#else
#include <moe_xe/gpu/team.hpp>
#include <moe_xe/generic/mainloop.hpp>
#endif

extern "C" MOE_XE_KERNEL_ATTRIBUTES void grouped_gemm(
    const void* a, const float* a_scales, const void* w, const void* shared_w, const void* shared_up, const void* scales, const void* zeros,
    const float* global_scales, const void* bias, void* d, const void* rows, const int* row_indices, const float* row_scales,
    int* queue_words, void* scratch, long total_rows, long a_rows, long d_rows, long a_stride, long w_stride, long w_expert_stride, long shared_stride, long shared_expert_stride,
    long bias_stride, long d_stride, long rows_stride, int num_experts) {
  using namespace moe_xe;
  const Arguments args{a, a_scales, w, shared_w, shared_up, scales, zeros, global_scales, bias, d, rows, row_indices, row_scales, queue_words,
                       scratch, total_rows, a_rows, d_rows, a_stride, w_stride, w_expert_stride, shared_stride, shared_expert_stride, bias_stride,
                       d_stride, rows_stride, num_experts};
  Team team;
  TileQueue<Team> queue(args, team);
  Mainloop mainloop(args, team);
  Tile tile;
  while (queue.receive(tile)) {
    queue.request();
    mainloop.run(tile);
  }
}
