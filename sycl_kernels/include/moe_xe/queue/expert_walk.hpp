// The walk over experts that every queue of tiles needs: a tile's number is turned into its expert from the experts' row
// counts alone, which only the device knows. Experts are visited by falling size (powers of two), so that the tail of the
// queue is made of the smallest; numbers only grow, so that the walk never restarts.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

// Team: the lanes that walk together (a sub-group on a GPU, one work-item on the CPU device). Tiles::of(rows): how many
// tiles an expert of so many rows has; Tiles::empty_experts: whether experts without rows have some too, then the last ones.
template <class Team, class Arguments, class Tiles> class ExpertWalk {
 public:
  ExpertWalk(const Arguments& arguments, const Team& team) : args(arguments), team(team) {
    unsigned sizes = 0;
    for (int first = 0; first < args.num_experts; first += Team::lanes) {
      const int mine = first + team.lane();
      const int64 rows = rows_of(mine);
      if (has_tiles(mine, rows)) sizes |= 1u << size_of_expert(rows);
    }
    remaining_sizes = team.any_bits(sizes);
    next_size();
  }

  // Moves to the expert that holds tile `number`; false after the last one. Numbers must not fall from call to call.
  bool find(int number) {
    while (number >= expert_first_tile + expert_tiles)
      if (!next_expert(number)) return false;
    return true;
  }

  int expert = -1;
  int expert_first_tile = 0, expert_tiles = 0;
  int64 expert_begin = 0, expert_end = 0;   // its rows

 private:
  static int size_of_expert(int64 rows) {
    const int log2 = 31 - __builtin_clz(unsigned(rows) | 1u);
    return Tiles::empty_experts && rows > 0 ? log2 + 1 : log2;
  }
  bool has_tiles(int which, int64 rows) const { return rows > 0 || (Tiles::empty_experts && which < args.num_experts); }

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

  // Moves to the expert of this size that holds the tile, or past one chunk of experts.
  bool next_expert(int number) {
    if (size < 0) return false;
    const int64 rows = rows_of(chunk + team.lane());
    const int64 rows_end = team.inclusive_scan(rows);
    const int64 begin = clamp(chunk_row + rows_end - rows), end = clamp(chunk_row + rows_end);
    const int tiles = has_tiles(chunk + team.lane(), rows) && size_of_expert(rows) == size ? Tiles::of(end - begin) : 0;
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
  unsigned remaining_sizes = 0;      // bit s: an expert of size s is still to come
  int size = -1;                     // experts of this size are being visited
  int chunk = 0;                     // first expert of the chunk of Team::lanes experts under the cursor
  int64 chunk_row = 0;               // first row of that chunk
  int chunk_tile = 0;                // first tile of that chunk
};

}  // namespace moe_xe
