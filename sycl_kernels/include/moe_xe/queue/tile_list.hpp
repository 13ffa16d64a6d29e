// All tiles of a launch in the order of their numbers, in global memory. Only the device knows the rows per expert, so the
// first work-group that comes makes the list, and the others wait for it: it is running, and waits for nobody. From then
// on a tile is one atomic and one load, however many experts there are.
//
// Experts come by falling size (powers of two of their rows), so that the tail of the queue is made of the smallest.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

// An entry for each expert; the list is behind them, and they are behind the work-groups' scratch.
template <class Arguments> Record* experts_of(const Arguments& args, int num_groups) {
  return reinterpret_cast<Record*>(static_cast<char*>(args.scratch) + num_groups * config::scratch_bytes);
}

// Team: the lanes of one work-group. Records: count(rows), tiles of an expert of so many rows; write(), the expert's part
// of the list; at(), the record of a tile.
template <class Team, class Arguments, class Records> class TileList {
 public:
  TileList(const Arguments& args, Team& team)
      : args(args), team(team), experts(experts_of(args, team.num_groups)), list(experts + args.num_experts) {}

  // Makes the list, or waits for it; then this work-group's first tile can be received.
  void open() {
    if (team.is_first(args.queue + arrived)) {
      num_tiles = make();
      team.publish(args.queue + ready, num_tiles + 1);
    } else if (team.leads()) {
      num_tiles = team.await(args.queue + ready) - 1;
    }
    if (team.leads()) hand_out(team.group);
  }

  // The list, by one work-group; returns the number of tiles.
  int make() {
    count_tiles();
    place_experts();
    team.barrier();
    for (int expert = team.sub_group; expert < args.num_experts; expert += team.num_sub_groups)
      Records::write(list, experts[expert].z, expert, experts[expert].x, experts[expert].y, team.lane(), Team::lanes);
    return tiles_of_sizes_from(0);
  }

  const Record* records() const { return list; }

  // Asks for the next tile, while the one before is computed: the atomic's latency is hidden.
  void request() {
    if (!team.leads()) return;
    if constexpr (Records::schedule == Schedule::dynamic) hand_out(team.num_groups + team.add(args.queue + next, 1));
    else hand_out(number + team.num_groups);
  }

  // Its record; negative after the last one. The work-group's lanes meet here.
  Record receive() { return team.receive(); }

  int number = 0;      // of the tile that was asked for; of the lane that leads

 private:
  enum { next, arrived, ready };    // words of the queue; ready: number of tiles + 1
  static constexpr int sizes = 32;
  static_assert(Team::sizes == sizes && config::scratch_bytes % sizeof(Record) == 0);

  void hand_out(int of) {
    number = of;
    team.hand_out(number < num_tiles ? Records::at(list, number) : Record(-1));
  }

  // What the counts say is read once: rows of each expert clamped to [0, total_rows] and so are their sums, so that wrong
  // counts leave rows out, but nothing outside is touched. An entry: begin, end, tiles, size.
  void count_tiles() {
    int* tiles_of_size = team.totals();
    const int worker = team.sub_group * Team::lanes + team.lane(), workers = team.num_sub_groups * Team::lanes;
    for (int size = worker; size < sizes; size += workers) tiles_of_size[size] = 0;
    team.barrier();
    int64 before = 0;
#pragma unroll 1
    for (int first = 0; first < args.num_experts; first += workers) {
      const int expert = first + worker;
      int64 all;
      const int64 rows = rows_of(expert), rows_end = before + team.scan(rows, all);
      const int begin = int(lesser(rows_end - rows, args.total_rows)), end = int(lesser(rows_end, args.total_rows));
      before += all;
      const int tiles = Records::count(end - begin), size = end > begin ? sizes - __builtin_clz(unsigned(end - begin)) : 0;
      if (expert < args.num_experts) {
        experts[expert] = Record{begin, end, tiles, size};
        if (tiles > 0) team.add_shared(tiles_of_size + size, tiles);
      }
    }
    team.barrier();
  }

  // A sub-group for each size; an entry's tiles become its first one.
  void place_experts() {
#pragma unroll 1
    for (int size = team.sub_group; size < sizes; size += team.num_sub_groups) {
      if (team.totals()[size] == 0) continue;
      int first = tiles_of_sizes_from(size + 1);
#pragma unroll 1
      for (int chunk = 0; chunk < args.num_experts; chunk += Team::lanes) {
        const int expert = chunk + team.lane();
        const Record entry = experts[expert < args.num_experts ? expert : args.num_experts - 1];
        const int tiles = expert < args.num_experts && entry.w == size ? entry.z : 0;
        const int end = team.inclusive_scan(tiles);
        if (tiles > 0) experts[expert].z = first + end - tiles;
        first += team.broadcast(end, Team::lanes - 1);
      }
    }
  }

  int tiles_of_sizes_from(int size) const {
    int tiles = 0;
    for (int larger = size + team.lane(); larger < sizes; larger += Team::lanes) tiles += team.totals()[larger];
    return team.broadcast(team.inclusive_scan(tiles), Team::lanes - 1);
  }

  int64 rows_of(int expert) const {
    if (expert >= args.num_experts) return 0;
    const auto* table = static_cast<const problem::RowCount*>(args.rows);
    int64 rows = table[expert];
    if constexpr (problem::rows_format == RowsFormat::ends) rows -= expert > 0 ? int64(table[expert - 1]) : 0;
    return rows < 0 ? 0 : lesser(rows, args.total_rows);
  }
  static int64 lesser(int64 x, int64 y) { return x < y ? x : y; }

  const Arguments& args;
  Team& team;
  Record* const experts;
  Record* const list;
  int num_tiles = 0;    // of the lane that leads
};

}  // namespace moe_xe
