// One queue of tiles that spans all experts. A tile's number is turned into (expert, rows, columns) from the experts'
// row counts alone, which only the device knows: experts are visited by falling size (powers of two), so that the tail
// of the queue is made of short tiles; an expert's rows are cut into the configuration's heights; and all tiles of an
// expert that share weights are neighbours. moe_xe/plan/schedule.py is the same decomposition on the host.
#pragma once
#include <moe_xe/types.hpp>

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

// Team: the lanes that walk the queue together (a sub-group on a GPU, one work-item on the CPU device).
template <class Team> class TileQueue {
 public:
  TileQueue(const Arguments& arguments, const Team& team) : args(arguments), team(team) {
    unsigned sizes = 0;
    for (int first = 0; first < args.num_experts; first += Team::lanes) {
      const int64 rows = rows_of(first + team.lane());
      if (rows > 0) sizes |= 1u << log2_of(rows);
    }
    remaining_sizes = team.any_bits(sizes);
    next_size();
  }

  // The tile with this number; false after the last one. Numbers must not fall from call to call.
  bool find(int number, Tile& tile) {
    while (number >= expert_first_tile + expert_tiles)
      if (!next_expert(number)) return false;
    const int local = number - expert_first_tile;
    const int row_tiles = expert_tiles / column_tiles;
    // groups of row tiles; within a group rows run fastest, so that neighbours in time share a column of weights
    const int group = local / (config::raster_group * column_tiles);
    const int in_group = local - group * config::raster_group * column_tiles;
    const int group_first = group * config::raster_group;
    const int group_rows = row_tiles - group_first < config::raster_group ? row_tiles - group_first : config::raster_group;
    const int column = in_group / group_rows;
    const RowCut cut = cut_rows(expert_end - expert_begin, group_first + in_group - column * group_rows);
    const int64 row = expert_begin + cut.row;
    const int64 left = expert_end - row;
    const int height = height_of(cut.variant);
    tile = Tile{expert, cut.variant, int(left < height ? left : height), column * config::tile_width, row, expert_end};
    return true;
  }

 private:
  static constexpr int column_tiles = int((problem::n + config::tile_width - 1) / config::tile_width);

  static int height_of(int variant) {
    int height = config::heights[0];
#pragma unroll
    for (int i = 1; i < int(sizeof(config::heights) / sizeof(int)); ++i)
      if (variant == i) height = config::heights[i];
    return height;
  }

  static int log2_of(int64 rows) { return 31 - __builtin_clz(unsigned(rows)); }

  // Counts are clamped to [0, total_rows]: a wrong count leaves rows out, but touches nothing outside.
  int64 rows_of(int expert) const {
    if (expert >= args.num_experts) return 0;
    const auto* table = static_cast<const problem::RowCount*>(args.rows);
    int64 rows = table[expert];
    if constexpr (problem::rows_format == RowsFormat::ends) rows -= expert > 0 ? int64(table[expert - 1]) : 0;
    return rows < 0 ? 0 : rows > args.total_rows ? args.total_rows : rows;
  }

  void next_size() {
    size = remaining_sizes ? 31 - __builtin_clz(remaining_sizes) : -1;
    if (size >= 0) remaining_sizes ^= 1u << size;
    chunk = 0;
    chunk_row = 0;
  }

  // Moves to the expert of this size that holds tile `number`, or past one chunk of experts.
  bool next_expert(int number) {
    if (size < 0) return false;
    const int64 rows = rows_of(chunk + team.lane());
    const int64 rows_end = team.inclusive_scan(rows);
    const int64 begin = clamp(chunk_row + rows_end - rows), end = clamp(chunk_row + rows_end);
    const int tiles = rows > 0 && log2_of(rows) == size ? cut_rows(end - begin, 0).count * column_tiles : 0;
    const int tiles_end = chunk_tile + team.inclusive_scan(tiles);
    const int found = team.first_lane_where(number < tiles_end);
    if (found < Team::lanes) {
      expert = chunk + found;
      expert_tiles = team.broadcast(tiles, found);
      expert_first_tile = team.broadcast(tiles_end, found) - expert_tiles;
      expert_begin = team.broadcast(begin, found);
      expert_end = team.broadcast(end, found);
      return true;
    }
    chunk_tile = team.broadcast(tiles_end, Team::lanes - 1);
    chunk_row += team.broadcast(rows_end, Team::lanes - 1);
    chunk += Team::lanes;
    if (chunk >= args.num_experts) next_size();
    return true;
  }

  int64 clamp(int64 row) const { return row > args.total_rows ? args.total_rows : row; }

  const Arguments& args;
  const Team& team;
  unsigned remaining_sizes = 0;      // bit s: an expert with 2^s <= rows < 2^(s+1) is still to come
  int size = -1;                     // experts of this size are being visited
  int chunk = 0;                     // first expert of the chunk of Team::lanes experts under the cursor
  int64 chunk_row = 0;               // first row of that chunk
  int chunk_tile = 0;                // first tile of that chunk
  int expert = -1;
  int expert_first_tile = 0, expert_tiles = 0;
  int64 expert_begin = 0, expert_end = 0;
};

}  // namespace moe_xe
