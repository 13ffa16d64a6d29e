// A tile of the weights' gradient on any SYCL GPU: plain loads and fp32 FMA. A lane owns columns of a sub-group's block;
// of each sorted row, left's elements come one a lane and are broadcast from registers.
#pragma once
#include <moe_xe/outer_types.hpp>
#include <moe_xe/scalar.hpp>
#include <moe_xe/gpu/team.hpp>

namespace moe_xe {

class OuterMainloop {
 public:
  OuterMainloop(const OuterArguments& arguments, const Team& team) : args(arguments), sub_group(team.sub_group), lane(team.lane()) {}

  void run(const OuterTile& tile) const {
    const int row = tile.row + sub_group / across * rows, column = tile.column + sub_group % across * config::sub_group_columns;
    if (row >= problem::p || column >= problem::q) return;
    if (problem::accumulate && tile.begin == tile.end) return;
    const auto* left_base = static_cast<const Input*>(args.left);
    const auto* right_base = static_cast<const Input*>(args.right);
    Block block;
    // Rows and columns beyond d repeat its last ones and are never stored: no read is outside.
#pragma unroll
    for (int i = 0; i < left_loads; ++i) block.left[i] = left_base + lesser(row + i * lanes + lane, problem::p - 1);
#pragma unroll
    for (int i = 0; i < groups; ++i) block.right[i] = right_base + lesser(column + i * lanes + lane, problem::q - 1);
#pragma unroll 1
    for (int64 first = tile.begin; first < tile.end; first += lanes) {
      // each lane finds one sorted row's place in both operands
      const int64 mine = sorted_row_of(tile, lesser(first + lane, tile.end - 1));
      const int64 left = source_row<Gathered::left>(mine) * args.left_stride;
      const int64 right = source_row<Gathered::right>(mine) * args.right_stride;
      const int count = int(lesser(lanes, tile.end - first));
      int i = 0;
#pragma unroll 1
      for (; i + step <= count; i += step) add<step>(block, left, right, i);
#pragma unroll 1
      for (; i < count; ++i) add<1>(block, left, right, i);
    }
    store(tile, row, column, block);
  }

 private:
  static constexpr int lanes = Team::lanes;
  static constexpr int rows = config::sub_group_rows, groups = config::sub_group_columns / lanes;
  static constexpr int across = config::tile_columns / config::sub_group_columns;
  static constexpr int left_loads = (rows + lanes - 1) / lanes;
  static constexpr int step = 4;   // sorted rows that are loaded before they are multiplied
  static_assert(config::sub_group_columns % lanes == 0);
  using Input = Element<problem::input>;
  using Output = Element<problem::output>;

  struct Block {
    const Input* left[left_loads];
    const Input* right[groups];
    float sums[rows][groups] = {};
  };

  // The sorted rows of lanes [first, first + count).
  template <int count> static void add(Block& block, int64 left_offset, int64 right_offset, int first) {
    float left[count][left_loads], right[count][groups];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int64 left_row = broadcast(left_offset, first + i), right_row = broadcast(right_offset, first + i);
#pragma unroll
      for (int j = 0; j < left_loads; ++j) left[i][j] = widened<problem::input>(alone(block.left[j][left_row]));
#pragma unroll
      for (int j = 0; j < groups; ++j) right[i][j] = widened<problem::input>(alone(block.right[j][right_row]));
    }
#pragma unroll
    for (int i = 0; i < count; ++i)
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        const float factor = __spirv_SubgroupShuffleINTEL(left[i][row / lanes], unsigned(row % lanes));
#pragma unroll
        for (int j = 0; j < groups; ++j) block.sums[row][j] = __builtin_fmaf(factor, right[i][j], block.sums[row][j]);
      }
  }

  void store(const OuterTile& tile, int first_row, int first_column, const Block& block) const {
    Output* d = static_cast<Output*>(args.d) + tile.expert * args.d_expert_stride + tile.split * args.d_split_stride;
#pragma unroll
    for (int j = 0; j < groups; ++j) {
      const int column = first_column + j * lanes + lane;
      if (column >= problem::q) continue;
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        if (first_row + row >= problem::p) continue;
        Output& to = d[(first_row + row) * args.d_stride + column];
        float value = block.sums[row][j];
        if constexpr (problem::accumulate) value += widened<problem::output>(to);
        to = rounded<problem::output>(value);
      }
    }
  }

  template <Gathered operand> int64 source_row(int64 sorted_row) const {
    if constexpr (problem::gathered == operand) return outer_source_row(args, sorted_row);
    else return sorted_row;
  }
  static int64 broadcast(int64 value, int from) { return __spirv_GroupBroadcast(__spv::Scope::Subgroup, value, unsigned(from)); }

  // Volatile for 16-bit elements: IGC joins neighbours to 32-bit messages, which an odd stride would misalign.
  using Alone = std::conditional_t<sizeof(Input) == 2, const volatile Input, const Input>;
  static Input alone(Alone& element) { return element; }

  static int64 lesser(int64 x, int64 y) { return x < y ? x : y; }

  const OuterArguments& args;
  const int sub_group, lane;
};

}  // namespace moe_xe
