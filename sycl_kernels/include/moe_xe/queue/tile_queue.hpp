// One queue of tiles that spans all experts. An expert's rows are cut into the configuration's heights; all tiles of an
// expert that share weights are neighbours. moe_xe/plan/model/schedule.py is the same on the host.
#pragma once
#include <moe_xe/queue/split_k.hpp>

namespace moe_xe {

constexpr int num_heights = sizeof(config::heights) / sizeof(int);

// How one expert's rows are cut: as many of each height as fit, tallest first; a rest that fills a height by at least
// config::min_fill_eighths / 8 takes that height too.
struct RowCut {
  int count;    // row tiles in all
  int variant;  // of the tile asked for
  int row;      // its first row, relative to the expert's first
  int height;
};

inline RowCut cut_rows(int rows, int wanted) {
  RowCut cut{0, 0, 0, 0};
  int row = 0;
#pragma unroll
  for (int i = 0; i < num_heights; ++i) {
    const int height = config::heights[i];
    const int rest = rows - row;
    int fit = rest > 0 ? rest / height : 0;
    const int left = rest - fit * height;
    if (left > 0 && (i == num_heights - 1 || left * 8 >= height * config::min_fill_eighths)) ++fit;
    if (wanted >= cut.count && wanted < cut.count + fit) {
      cut.variant = i;
      cut.row = row + (wanted - cut.count) * height;
      cut.height = height;
    }
    cut.count += fit;
    row += fit * height;
  }
  return cut;
}

// A tile's record: expert, first row, first column, rows and variant; where K is split, each part has a number, and its record
// that number, too.
struct TileRecords {
  static constexpr Schedule schedule = config::schedule;
  static constexpr int columns = int((problem::n + config::tile_width - 1) / config::tile_width);
  static constexpr int variant_bits = 4;
  static constexpr int number_bit = 21;     // above rows and variant
  static_assert(num_heights <= 1 << variant_bits && config::heights[0] << variant_bits < 1 << number_bit);

  static int cut(int rows) { return cut_rows(rows, 0).count; }
  static int count(int row_tiles) { return row_tiles * columns * config::splits; }

  static Record at(const Record* list, int number) {
    if constexpr (!split) return list[number];
    Record record = list[int64(number / config::splits) * entry_records];
    record.w |= number << number_bit;
    return record;
  }

  static Tile tile_of(Record record) {
    constexpr int variants = 1 << variant_bits;
    if constexpr (!split) return Tile{record.x, record.w & (variants - 1), record.w >> variant_bits, record.z, record.y};
    const int rows = (record.w & ((1 << number_bit) - 1)) >> variant_bits, number = record.w >> number_bit;
    const int entry = number / config::splits;
    return Tile{record.x, record.w & (variants - 1), rows, record.z, record.y, entry, number - entry * config::splits};
  }

  // Groups of row tiles; within a group rows run fastest, so that neighbours in time share a column of weights.
  static void write(Record* list, int expert, Record entry, const Record* runs, int lane, int lanes) {
    const int row_tiles = row_tiles_of(entry, runs), first = entry.z;
#pragma unroll 1
    for (int wanted = lane; wanted < row_tiles; wanted += lanes) {
      const Record run = in_runs ? run_with(runs, wanted) : Record{entry.x, entry.y, 0, 0};
      const RowCut cut = cut_rows(run.y - run.x, wanted - run.w);
      const int row = run.x + cut.row, left = run.y - row;
      const int in_group = wanted % config::raster_group, group = wanted - in_group;
      const int group_rows = row_tiles - group < config::raster_group ? row_tiles - group : config::raster_group;
      Record* to = list + first / config::splits * entry_records + group * columns * entry_records + in_group * entry_records;
#pragma unroll 1
      for (int column = 0; column < columns; ++column, to += group_rows * entry_records) {
        *to = Record{expert, row, column * config::tile_width, (left < cut.height ? left : cut.height) << variant_bits | cut.variant};
        if constexpr (split) to[1] = Record(0);
      }
    }
  }

 private:
  static int row_tiles_of(Record entry, const Record* runs) {
    if constexpr (!in_runs) return cut(entry.y - entry.x);
    const Record last = runs[problem::ranks - 1];
    return last.w + cut(last.y - last.x);
  }

  // The run that has an expert's row tile of this number: the last one with no more before it, as the others up to there end before.
  static Record run_with(const Record* runs, int row_tile) {
    int rank = 0;
#pragma unroll 1
    for (int later = 1; later < problem::ranks; ++later) rank += runs[later].w <= row_tile;
    return runs[rank];
  }
};

template <class Team> class TileQueue {
 public:
  TileQueue(const Arguments& args, Team& team) : tiles(args, team) { tiles.open(); }

  void request() { tiles.request(); }

  // The tile that was asked for, at first the one of the work-group's number; false after the last one.
  bool receive(Tile& tile) {
    const Record record = tiles.receive();
    tile = TileRecords::tile_of(record);
    return record.x >= 0;
  }

  int number() const { return tiles.number; }    // of the tile received last, until the next one is asked for; for the lane that leads

 private:
  TileList<Team, Arguments, TileRecords> tiles;
};

}  // namespace moe_xe
