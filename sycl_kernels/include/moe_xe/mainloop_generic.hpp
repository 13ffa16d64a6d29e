// A tile on any SYCL GPU: plain loads and fp32 FMA, for devices without dpas, for exact fp32 and for operands that 2D
// block messages cannot take. A lane owns columns of a sub-group's block; rows of A are read 16 elements at a time, one
// a lane, and broadcast from registers.
#pragma once
#include <moe_xe/scalar.hpp>
#include <moe_xe/team_gpu.hpp>

namespace moe_xe {

class Mainloop {
 public:
  Mainloop(const Arguments& arguments, const Team& team) : args(arguments), sub_group(team.sub_group), lane(team.lane()) {}

  void run(const Tile& tile) const { run_height<0>(tile); }

 private:
  static constexpr int lanes = Team::lanes;
  static constexpr int k_step = 4;   // elements of W that a lane reads at once
  using Input = Element<problem::input>;
  using Output = Element<problem::output>;

  template <int variant> void run_height(const Tile& tile) const {
    if constexpr (variant + 1 < int(sizeof(config::heights) / sizeof(int)))
      if (tile.variant != variant) return run_height<variant + 1>(tile);
    constexpr int rows = config::sub_group_rows[variant], columns = config::sub_group_columns[variant];
    constexpr int across = config::tile_width / columns;
    static_assert(columns % lanes == 0 && config::tile_width % columns == 0);
    const int row = sub_group / across * rows;
    const int column = tile.column + sub_group % across * columns;
    if (row < tile.rows && column < problem::n) run_block<rows, columns / lanes>(tile, row, column);
  }

  // Rows and columns beyond the tile repeat the last one and are never stored: no read is outside.
  template <int rows, int groups> void run_block(const Tile& tile, int first_row, int first_column) const {
    const Input* a[rows];
    const Input* w[groups];
#pragma unroll
    for (int row = 0; row < rows; ++row) a[row] = row_of_a(tile.row + lesser(first_row + row, tile.rows - 1));
#pragma unroll
    for (int group = 0; group < groups; ++group) w[group] = column_of_w(tile.expert, column_of(first_column, group));
    float sums[rows][groups] = {};
    constexpr int whole = int(problem::k / lanes * lanes), rest = int(problem::k - whole);
#pragma unroll 1
    for (int k = 0; k < whole; k += lanes) add<lanes>(a, w, k, sums);
    if constexpr (rest > 0) add<rest>(a, w, whole, sums);
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      const int column = first_column + group * lanes + lane;
      if (column >= problem::n) continue;
      float bias = 0.f;
      if constexpr (problem::has_bias)
        bias = widened<problem::bias>(static_cast<const Element<problem::bias>*>(args.bias)[tile.expert * args.bias_stride + column]);
#pragma unroll
      for (int row = 0; row < rows; ++row)
        if (first_row + row < tile.rows)
          static_cast<Output*>(args.d)[(tile.row + first_row + row) * args.d_stride + column] =
              rounded<problem::output>(problem::has_bias ? sums[row][group] + bias : sums[row][group]);
    }
  }

  // sums += A[row, k..k+count) * W[k..k+count, column]; w walks along K: products of 64-bit strides would fill registers.
  template <int count, int rows, int groups>
  void add(const Input* const (&a)[rows], const Input* (&w)[groups], int k, float (&sums)[rows][groups]) const {
    float tokens[rows];
#pragma unroll
    for (int row = 0; row < rows; ++row) tokens[row] = widened<problem::input>(a[row][k + lesser(lane, count - 1)]);
#pragma unroll
    for (int first = 0; first < count; first += k_step) {
      float weights[groups][k_step];
#pragma unroll
      for (int group = 0; group < groups; ++group)
#pragma unroll
        for (int i = 0; i < k_step; ++i)
          if (first + i < count) {
            weights[group][i] = widened<problem::input>(alone(*w[group]));
            w[group] += problem::weights == WeightLayout::enk ? 1 : args.w_stride;
          }
#pragma unroll
      for (int i = 0; i < k_step; ++i)
#pragma unroll
        for (int row = 0; row < rows; ++row) {
          if (first + i >= count) continue;
          const float token = __spirv_SubgroupShuffleINTEL(tokens[row], unsigned(first + i));
#pragma unroll
          for (int group = 0; group < groups; ++group) sums[row][group] = __builtin_fmaf(token, weights[group][i], sums[row][group]);
        }
    }
  }

  // Volatile for 16-bit elements: IGC joins neighbours to 32-bit messages, which an odd stride would misalign.
  using Alone = std::conditional_t<sizeof(Input) == 2, const volatile Input, const Input>;
  static Input alone(Alone& element) { return element; }

  static int lesser(int x, int y) { return x < y ? x : y; }
  int column_of(int first_column, int group) const { return lesser(first_column + group * lanes + lane, int(problem::n) - 1); }
  const Input* row_of_a(int64 row) const {
    if constexpr (problem::gathered) {
      const int64 index = args.gather_indices[row];
      row = index < 0 ? 0 : index < args.a_rows ? index : args.a_rows - 1;
    }
    return static_cast<const Input*>(args.a) + row * args.a_stride;
  }
  const Input* column_of_w(int expert, int column) const {
    const Input* w = static_cast<const Input*>(args.w) + expert * args.w_expert_stride;
    return problem::weights == WeightLayout::enk ? w + column * args.w_stride : w + column;
  }

  const Arguments& args;
  const int sub_group, lane;
};

}  // namespace moe_xe
