// The queue of the weights' gradient: every expert has the same tiles, also one without rows (its gradient is zero).
#pragma once
#include <moe_xe/queue/tile_list.hpp>
#include <moe_xe/outer_types.hpp>

namespace moe_xe {

// The list has a record for each expert: expert, begin and end of its rows; that of a tile adds the tile's number within it.
struct OuterRecords {
  static constexpr Schedule schedule = Schedule::dynamic;
  static constexpr int row_tiles = int((problem::p + config::tile_rows - 1) / config::tile_rows);
  static constexpr int column_tiles = int((problem::q + config::tile_columns - 1) / config::tile_columns);
  static constexpr int tiles = row_tiles * column_tiles * config::splits;

  static int cut(int) { return 0; }
  static int count(int) { return tiles; }

  static Record at(const Record* list, int number) {
    const int place = number / tiles;
    Record record = list[place];
    record.w = number - place * tiles;
    return record;
  }

  static void write(Record* list, int expert, Record entry, const Record*, int lane, int) {
    if (lane == 0) list[entry.z / tiles] = Record{expert, entry.x, entry.y, 0};
  }
};

template <class Team> class OuterQueue {
 public:
  OuterQueue(const OuterArguments& args, Team& team) : args(args), team(team), tiles(args, team) { tiles.open(); }

  void request() { tiles.request(); }

  // The tile that was asked for, at first the one of the work-group's number; false after the last one. Tiles that share
  // rows are neighbours: columns run fastest within a split.
  bool receive(OuterTile& tile) {
    const Record record = tiles.receive();
    constexpr int places = OuterRecords::row_tiles * OuterRecords::column_tiles;
    const int split = record.w / places, place = record.w - split * places;
    const int row = place / OuterRecords::column_tiles, column = place - row * OuterRecords::column_tiles;
    // equal shares of the rows, in whole steps
    const int64 end = record.z, rows = end - record.y;
    const int64 share = (rows + config::splits * step - 1) / (config::splits * step) * step;
    const int64 first = record.y + split * share, last = first + share;
    tile = OuterTile{record.x, split, row * config::tile_rows, column * config::tile_columns, first < end ? first : end,
                     last < end ? last : end};
    if constexpr (in_runs) {
      tile.runs = runs_of(args, team.num_groups, record.x);
      team.take_over();    // every sub-group reads them
    }
    return record.x >= 0;
  }

 private:
  static constexpr int step = 32;
  const OuterArguments& args;
  Team& team;
  TileList<Team, OuterArguments, OuterRecords> tiles;
};

}  // namespace moe_xe
