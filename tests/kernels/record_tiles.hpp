// A kernel that takes tiles from the queue as grouped_gemm.cpp does, but writes them down instead of computing them.
#include <moe_xe/queue/tile_queue.hpp>
#ifdef MOE_XE_CPU
#include <moe_xe/cpu/team.hpp>
#else
#include <moe_xe/gpu/team.hpp>
#endif

// Counts of ranks lie side by side. seen: [capacity][7] expert, height, rows, column, row, part, how often; a tile's place is where the list has its record
extern "C" MOE_XE_KERNEL_ATTRIBUTES void record_tiles(const void* rows, int* queue_words, void* scratch, int* seen, long total_rows,
                                                      int num_experts, int capacity) {
  using namespace moe_xe;
  Arguments args{};
  args.rows = rows;
  args.queue = queue_words;
  args.scratch = scratch;
  args.total_rows = total_rows;
  args.num_experts = num_experts;
  args.rows_stride = num_experts;
  Team team;
  TileQueue<Team> queue(args, team);
  Tile tile;
  while (queue.receive(tile)) {
    const int number = queue.number();
    queue.request();
    if (!team.leads() || number >= capacity) continue;
    int height = 0;
    for (int i = 0; i < num_heights; ++i)
      if (i == tile.variant) height = config::heights[i];
    int* entry = seen + number * 7;
    entry[0] = tile.expert;
    entry[1] = height;
    entry[2] = tile.rows;
    entry[3] = tile.column;
    entry[4] = int(tile.row);
    entry[5] = tile.part;
    entry[6] += 1;
  }
}
