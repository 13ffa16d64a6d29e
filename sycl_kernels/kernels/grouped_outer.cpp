// The persistent gradient of the weights: every work-group takes tiles of all experts' d from one queue until it is empty.
#include <moe_xe/queue/outer_queue.hpp>
#if defined(MOE_XE_CPU)
#include <moe_xe/cpu/team.hpp>
#include <moe_xe/cpu/outer.hpp>
#elif defined(MOE_XE_XE)
#include <moe_xe/gpu/team.hpp>
#include <moe_xe/xe/outer.hpp>
#else
#include <moe_xe/gpu/team.hpp>
#include <moe_xe/generic/outer.hpp>
#endif

extern "C" MOE_XE_KERNEL_ATTRIBUTES void grouped_outer(
    const void* left, const void* right, void* d, const void* rows, const int* row_indices,
    const long* row_addresses, int* queue_words, void* scratch, long total_rows, long left_rows, long right_rows,
    long left_stride, long right_stride, long d_stride,
    long d_expert_stride, long d_split_stride, long rows_stride, int num_experts) {
  using namespace moe_xe;
  const OuterArguments args{left, right, d, rows, row_indices, row_addresses, queue_words, scratch, total_rows, left_rows, right_rows,
                            left_stride, right_stride, d_stride, d_expert_stride, d_split_stride, rows_stride, num_experts};
  Team team;
  OuterQueue<Team> queue(args, team);
  OuterMainloop mainloop(args, team);
  OuterTile tile;
  while (queue.receive(tile)) {
    queue.request();
    mainloop.run(tile);
  }
}
