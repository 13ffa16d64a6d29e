// K shared out over work-groups, for fewer tiles than cores. Each leaves its part's sums behind the tile's record; the last one to
// come adds all of them, in the order of K, and finishes the tile. Nobody waits for another.
#pragma once
#include <moe_xe/queue/tile_list.hpp>

namespace moe_xe {

constexpr bool split = config::splits > 1;
static_assert(!split || problem::codes == Codes::none, "loops over codes sum all of K");

// A tile's entry in the list: its record; where K is split, how many parts are done, in a record of its own, and their sums.
constexpr int entry_records = int(config::entry_bytes / int64(sizeof(Record)));
constexpr int part_floats = split ? int((config::entry_bytes / int64(sizeof(Record)) - 2) * 4 / config::splits) : 0;
static_assert(entry_records * int64(sizeof(Record)) == config::entry_bytes);

// Elements of K in every part but the last one, which has the rest: whole units.
constexpr int64 part_of_k(int64 unit) { return problem::k / (config::splits * unit) * unit; }

struct KRange {
  int64 begin, end;
};

// Of K, what a tile, or its part, sums.
inline KRange part_of(const Tile& tile, int64 unit) {
  if constexpr (!split) return {0, problem::k};
  const int64 begin = tile.part * part_of_k(unit);
  return {begin, tile.part == config::splits - 1 ? problem::k : begin + part_of_k(unit)};
}

struct Parts {
  int32* done;    // how many
  float* sums;    // part_floats of each

  float* of(int part) const { return sums + int64(part) * part_floats; }
};

inline Parts parts_of(const Arguments& args, int num_groups, const Tile& tile) {
  Record* entry = list_of(args, num_groups) + int64(tile.entry) * entry_records;
  return {reinterpret_cast<int32*>(entry + 1), reinterpret_cast<float*>(entry + 2)};
}

}  // namespace moe_xe
