// The queue of the weights' gradient: every expert has the same tiles, also one without rows (its gradient is zero).
#pragma once
#include <moe_xe/queue/expert_walk.hpp>
#include <moe_xe/outer_types.hpp>

namespace moe_xe {

template <class Team> class OuterQueue {
 public:
  OuterQueue(const OuterArguments& arguments, const Team& team) : walk(arguments, team) {}

  // The tile with this number; false after the last one. Numbers must not fall from call to call. Tiles that share rows
  // are neighbours: columns run fastest within a split.
  bool find(int number, OuterTile& tile) {
    if (!walk.find(number)) return false;
    const int local = number - walk.expert_first_tile;
    const int split = local / (row_tiles * column_tiles);
    const int place = local - split * row_tiles * column_tiles;
    const int row = place / column_tiles;
    // equal shares of the rows, in whole steps
    const int64 rows = walk.expert_end - walk.expert_begin;
    const int64 share = (rows + config::splits * step - 1) / (config::splits * step) * step;
    const int64 begin = walk.expert_begin + split * share, end = begin + share;
    tile = OuterTile{walk.expert, split, row * config::tile_rows, (place - row * column_tiles) * config::tile_columns,
                     begin < walk.expert_end ? begin : walk.expert_end, end < walk.expert_end ? end : walk.expert_end};
    return true;
  }

 private:
  static constexpr int step = 32;
  static constexpr int row_tiles = int((problem::p + config::tile_rows - 1) / config::tile_rows);
  static constexpr int column_tiles = int((problem::q + config::tile_columns - 1) / config::tile_columns);
  struct Tiles {
    static constexpr bool empty_experts = true;
    static int of(int64) { return row_tiles * column_tiles * config::splits; }
  };

  ExpertWalk<Team, OuterArguments, Tiles> walk;
};

}  // namespace moe_xe
