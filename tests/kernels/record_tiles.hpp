// A kernel that walks the tile queue as grouped_gemm.cpp does, but writes down the tiles instead of computing them.
#include <moe_xe/queue/tile_queue.hpp>
#ifdef MOE_XE_CPU
#include <moe_xe/cpu/team.hpp>
#else
#include <moe_xe/gpu/team.hpp>
#endif

// visits: [capacity] tiles seen under each number; seen: [capacity][6] expert, height, rows, column, row (2 words)
extern "C" MOE_XE_KERNEL_ATTRIBUTES void record_tiles(const void* rows, int* tile_counter, int* visits, int* seen,
                                                      long total_rows, int num_experts, int capacity) {
  using namespace moe_xe;
  Arguments args{};
  args.rows = rows;
  args.tile_counter = tile_counter;
  args.total_rows = total_rows;
  args.num_experts = num_experts;
  Team team;
  TileQueue<Team> queue(args, team);
  const bool writes = team.lane() == 0
#ifndef MOE_XE_CPU
                      && team.sub_group == 0
#endif
      ;
  Tile tile;
  int number = team.group;
  while (queue.find(number, tile)) {
    if constexpr (config::schedule == Schedule::dynamic) team.request_tile(tile_counter);
    if (writes && number < capacity) {
      int height = 0;
      for (int i = 0; i < int(sizeof(config::heights) / sizeof(int)); ++i)
        if (i == tile.variant) height = config::heights[i];
      visits[number] += 1;
      int* entry = seen + number * 6;
      entry[0] = tile.expert;
      entry[1] = height;
      entry[2] = tile.rows;
      entry[3] = tile.column;
      entry[4] = int(tile.row);
      entry[5] = int(tile.row >> 32);
    }
    if constexpr (config::schedule == Schedule::dynamic) number = team.num_groups + team.receive_tile();
    else number += team.num_groups;
  }
}
