// Tiles on Xe's matrix engines: the weights' layout decides the product's orientation, a tile's height its code.
//
// What the host guarantees: `a`, `d` and each expert's weights begin at multiples of 64 bytes; rows begin and end at
// multiples of 16 bytes and are at least 64 bytes long; a surface has fewer than 2^24 rows and bytes a row. A surface
// is one expert's weights, or `a` and `d` up to the expert's last row, or all of `d` where rows scatter: loads and stores past
// it do nothing.
#pragma once
#include <moe_xe/xe/mainloop_ekn.hpp>
#include <moe_xe/xe/mainloop_enk.hpp>
#include <moe_xe/gpu/team.hpp>

namespace moe_xe {

template <int variant>
using SubGroupTile = std::conditional_t<problem::weights == WeightLayout::enk, FeaturesByTokens<variant>, TokensByFeatures<variant>>;

class Mainloop {
 public:
  Mainloop(const Arguments& args, const Team& team) : args(args), team(team), sub_group(team.sub_group), lane(team.lane()) {}

  [[gnu::always_inline]] void run(const Tile& tile) const { run_variant<0>(tile); }

 private:
  template <int variant> [[gnu::always_inline]] void run_variant(const Tile& tile) const {
    if constexpr (variant + 1 < int(sizeof(config::heights) / sizeof(int)))
      if (tile.variant != variant) return run_variant<variant + 1>(tile);
    using Part = Shape<variant>;
    // Those whose rows or columns are all beyond the tile's only meet the others at barriers; where one comes in between, they compute
    // as the others do, what is nobody's.
    const bool idle = sub_group >= Part::sub_groups || Part::first_row(sub_group) >= tile.rows || Part::first_output(tile, sub_group) >= out_n;
    if (!split && idle) return;
    SubGroupTile<variant> product(args, tile, sub_group, unknown(lane));
    loop_over_k(product, tile.part);
    if constexpr (split) {
      const Parts parts = parts_of(args, team.num_groups, tile);
      constexpr int of_sub_group = Part::rows * Part::columns;
      if (!idle) product.save(parts.of(tile.part) + sub_group * of_sub_group);
      if (!team.is_last(parts.done, config::splits) || idle) return;
      product.add_up(parts.of(0) + sub_group * of_sub_group);
    }
    product.store();
    // Else the compiler would store for all heights in one place, and copy the sums there.
    asm volatile("" : : "P"(variant));
  }

  const Arguments& args;
  const Team& team;
  const int sub_group, lane;
};

}  // namespace moe_xe
