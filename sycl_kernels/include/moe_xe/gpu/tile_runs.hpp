// A tile's sorted rows in the weights' gradient, run by run.
#pragma once
#include <moe_xe/gpu/team.hpp>
#include <moe_xe/outer_types.hpp>
#include <moe_xe/queue/runs.hpp>

namespace moe_xe {

// add(begin, end) of each run that has some of the tile's rows; once, of all rows or none, where there are no runs.
template <class Add> [[gnu::always_inline]] inline void for_each_run(const OuterTile& tile, Add add) {
  if constexpr (!in_runs) {
    add(tile.begin, tile.end);
  } else {
#pragma unroll 1
    for (int rank = 0; rank < problem::ranks; ++rank) {
      const Record run = tile.runs[rank];
      const int first = Team::uniform(run.x), before = Team::uniform(run.z), rows = Team::uniform(run.y) - first;
      const int64 begin = tile.begin > before ? tile.begin - before : 0, end = tile.end < before + rows ? tile.end - before : rows;
      if (begin < end) add(first + begin, first + end);
    }
  }
}

}  // namespace moe_xe
