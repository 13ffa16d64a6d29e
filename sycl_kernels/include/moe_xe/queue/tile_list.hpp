// All tiles of a launch in the order of their numbers, in global memory. Only the device knows the rows per expert, so the
// first work-group that comes makes the list, and the others wait for it: it is running, and waits for nobody. From then
// on a tile is one atomic and one load, however many experts there are.
//
// Experts come by falling size (powers of two of their rows), so that the tail of the queue is made of the smallest.
#pragma once
#include <moe_xe/queue/runs.hpp>

namespace moe_xe {

// Team: the lanes of one work-group. Records: cut(rows), row tiles of a run of so many rows; count(row_tiles), tiles of an expert;
// write(), the expert's part of the list; at(), the record of a tile.
template <class Team, class Arguments, class Records> class TileList {
 public:
  TileList(const Arguments& args, Team& team)
      : args(args), team(team), experts(experts_of(args, team.num_groups)), list(list_of(args, team.num_groups)) {}

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
      Records::write(list, expert, experts[expert], runs_of(args, team.num_groups, expert), team.lane(), Team::lanes);
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
  static constexpr bool batched = problem::rows_format == RowsFormat::batched;
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
    const int num_runs = args.num_experts * problem::ranks;
    int64 before = 0;
#pragma unroll 1
    for (int first = 0; first < num_runs; first += workers) {
      const int run = first + worker;
      const int64 rows = rows_of(run, num_runs);
      int64 rows_end = run * room() + rows;
      if constexpr (!batched) {
        int64 all;
        rows_end = before + team.scan(rows, all);
        before += all;
      }
      const int begin = int(lesser(rows_end - rows, args.total_rows)), end = int(lesser(rows_end, args.total_rows));
      if (run < num_runs) {
        if constexpr (in_runs) runs_of(args, team.num_groups, run % args.num_experts)[run / args.num_experts] = Record{begin, end, 0, 0};
        else enter(run, begin, end, Records::cut(end - begin));
      }
    }
    team.barrier();
    if constexpr (in_runs) {
      for (int expert = worker; expert < args.num_experts; expert += workers) join_runs(expert);
      team.barrier();
    }
  }

  void enter(int expert, int begin, int end, int row_tiles) {
    const int tiles = Records::count(row_tiles), size = end > begin ? sizes - __builtin_clz(unsigned(end - begin)) : 0;
    experts[expert] = Record{begin, end, tiles, size};
    if (tiles > 0) team.add_shared(team.totals() + size, tiles);
  }

  // The tiles of an expert's runs are neighbours: they share its weights.
  void join_runs(int expert) {
    Record* runs = runs_of(args, team.num_groups, expert);
    int rows = 0, row_tiles = 0;
#pragma unroll 1
    for (int rank = 0; rank < problem::ranks; ++rank) {
      const int begin = runs[rank].x, end = runs[rank].y;
      runs[rank] = Record{begin, end, rows, row_tiles};
      rows += end - begin;
      row_tiles += Records::cut(end - begin);
    }
    enter(expert, 0, rows, row_tiles);
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

  int64 rows_of(int run, int num_runs) const {
    if (run >= num_runs) return 0;
    const auto* table = static_cast<const problem::RowCount*>(args.rows);
    int64 rows = in_runs ? table[run / args.num_experts * args.rows_stride + run % args.num_experts] : table[run];
    if constexpr (problem::rows_format == RowsFormat::ends) rows -= run > 0 ? int64(table[run - 1]) : 0;
    return rows < 0 ? 0 : lesser(rows, room());
  }
  // How many rows an expert can have.
  int64 room() const { return batched ? args.total_rows / args.num_experts : args.total_rows; }
  static int64 lesser(int64 x, int64 y) { return x < y ? x : y; }

  const Arguments& args;
  Team& team;
  Record* const experts;
  Record* const list;
  int num_tiles = 0;    // of the lane that leads
};

}  // namespace moe_xe
