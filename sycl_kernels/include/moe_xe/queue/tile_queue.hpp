// One queue of tiles that spans all experts: the walk finds a tile's expert, whose rows are cut into the configuration's
// heights; all tiles of an expert that share weights are neighbours. moe_xe/plan/model/schedule.py is the same on the host.
#pragma once
#include <moe_xe/queue/expert_walk.hpp>

namespace moe_xe {

// How one expert's rows are cut: as many of each height as fit, tallest first; a rest that fills a height by at least
// config::min_fill_eighths / 8 takes that height too.
struct RowCut {
  int count;    // row tiles in all
  int variant;  // of the tile asked for
  int row;      // its first row, relative to the expert's first
};

inline RowCut cut_rows(int64 rows, int wanted) {
  constexpr int num_heights = sizeof(config::heights) / sizeof(int);
  RowCut cut{0, 0, 0};
  int row = 0;
#pragma unroll
  for (int i = 0; i < num_heights; ++i) {
    const int height = config::heights[i];
    const int rest = int(rows) - row;
    int fit = rest > 0 ? rest / height : 0;
    const int left = rest - fit * height;
    if (left > 0 && (i == num_heights - 1 || left * 8 >= height * config::min_fill_eighths)) ++fit;
    if (wanted >= cut.count && wanted < cut.count + fit) {
      cut.variant = i;
      cut.row = row + (wanted - cut.count) * height;
    }
    cut.count += fit;
    row += fit * height;
  }
  return cut;
}

template <class Team> class TileQueue {
 public:
  TileQueue(const Arguments& arguments, const Team& team) : walk(arguments, team) {}

  // The tile with this number; false after the last one. Numbers must not fall from call to call.
  bool find(int number, Tile& tile) {
    if (!walk.find(number)) return false;
    const int local = number - walk.expert_first_tile;
    const int row_tiles = walk.expert_tiles / column_tiles;
    // groups of row tiles; within a group rows run fastest, so that neighbours in time share a column of weights
    const int group = local / (config::raster_group * column_tiles);
    const int in_group = local - group * config::raster_group * column_tiles;
    const int group_first = group * config::raster_group;
    const int group_rows = row_tiles - group_first < config::raster_group ? row_tiles - group_first : config::raster_group;
    const int column = in_group / group_rows;
    const RowCut cut = cut_rows(walk.expert_end - walk.expert_begin, group_first + in_group - column * group_rows);
    const int64 row = walk.expert_begin + cut.row;
    const int64 left = walk.expert_end - row;
    const int height = height_of(cut.variant);
    tile = Tile{walk.expert, cut.variant, int(left < height ? left : height), column * config::tile_width, row, walk.expert_end};
    return true;
  }

 private:
  static constexpr int column_tiles = int((problem::n + config::tile_width - 1) / config::tile_width);
  struct Tiles {
    static constexpr bool empty_experts = false;
    static int of(int64 rows) { return cut_rows(rows, 0).count * column_tiles; }
  };

  static int height_of(int variant) {
    int height = config::heights[0];
#pragma unroll
    for (int i = 1; i < int(sizeof(config::heights) / sizeof(int)); ++i)
      if (variant == i) height = config::heights[i];
    return height;
  }

  ExpertWalk<Team, Arguments, Tiles> walk;
};

}  // namespace moe_xe
