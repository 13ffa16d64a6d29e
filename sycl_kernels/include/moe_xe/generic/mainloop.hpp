// A tile on any SYCL GPU: plain loads and fp32 FMA, for devices without dpas, for exact fp32 and for operands that 2D
// block messages cannot take. A lane owns columns of a sub-group's block; rows of A are read 16 elements at a time, one
// a lane, and broadcast from registers.
#pragma once
#include <moe_xe/gpu/epilogue.hpp>
#include <moe_xe/generic/weight_column.hpp>
#include <moe_xe/gpu/team.hpp>
#include <moe_xe/queue/split_k.hpp>

namespace moe_xe {

class Mainloop {
 public:
  Mainloop(const Arguments& arguments, const Team& team) : args(arguments), team(team), sub_group(team.sub_group), lane(team.lane()) {}

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
    static_assert(!paired || columns % (2 * lanes) == 0, "a lane owns both columns of a pair");
    const int row = sub_group / across * rows;
    constexpr int outputs = paired ? columns / 2 : columns;
    const int64 column = (paired ? tile.column / 2 : tile.column) + sub_group % across * outputs;
    constexpr int groups = columns / lanes;
    const bool idle = row >= tile.rows || column >= out_n;
    float sums[rows][groups] = {};
    if (!idle) add_block(tile, row, column, sums);
    if constexpr (split) {
      const Parts parts = parts_of(args, team.num_groups, tile);
      const int place = sub_group * rows * columns + lane;
      if (!idle) save(sums, parts.of(tile.part) + place);
      if (!team.is_last(parts.done, config::splits)) return;
      if (!idle) add_parts(sums, parts.of(0) + place);
    }
    if (!idle) finish_block(tile, row, column, sums);
  }

  template <int rows, int groups> static void save(const float (&sums)[rows][groups], float* to) {
#pragma unroll
    for (int i = 0; i < rows * groups; ++i) to[i * lanes] = sums[i / groups][i % groups];
  }
  template <int rows, int groups> static void add_parts(float (&sums)[rows][groups], const float* from) {
#pragma unroll
    for (int i = 0; i < rows * groups; ++i) {
      float sum = from[i * lanes];
      for (int part = 1; part < config::splits; ++part) sum += from[part * part_floats + i * lanes];
      sums[i / groups][i % groups] = sum;
    }
  }

  // Rows and columns beyond the tile repeat the last one and are never stored: no read is outside. Where columns are
  // pairs, the first half of a lane's columns are gates and the others their up values.
  template <int rows, int groups>
  void add_block(const Tile& tile, int first_row, int64 first_column, float (&sums)[rows][groups]) const {
    constexpr int out_groups = paired ? groups / 2 : groups;
    const KRange part = part_of(tile, lanes);
    const Input* a[rows];
    WeightColumn w[groups];
#pragma unroll
    for (int row = 0; row < rows; ++row) a[row] = row_of_a(tile.row + lesser(first_row + row, tile.rows - 1));
    const WeightColumns weights(args, tile.expert);
#pragma unroll
    for (int group = 0; group < groups; ++group)
      w[group] = weights.column(column_of(first_column, group % out_groups), group < out_groups ? 0 : 1, part.begin);
    constexpr int whole = int(problem::k / lanes * lanes), rest = int(problem::k - whole);
    const int end = int(part.end / lanes * lanes);
#pragma unroll 1
    for (int k = int(part.begin); k < end; k += lanes) add<lanes>(a, weights, w, k, sums);
    if constexpr (rest > 0)
      if (part.end == problem::k) add<rest>(a, weights, w, whole, sums);
  }

  template <int rows, int groups>
  void finish_block(const Tile& tile, int first_row, int64 first_column, const float (&sums)[rows][groups]) const {
    constexpr int out_groups = paired ? groups / 2 : groups;
#pragma unroll
    for (int group = 0; group < out_groups; ++group) {
      const int64 column = first_column + group * lanes + lane;
      if (column >= out_n) continue;
      float bias = 0.0f, up_bias = 0.0f;
      if constexpr (problem::has_bias) {
        bias = bias_at(args, tile.expert, column, 0);
        if constexpr (paired) up_bias = bias_at(args, tile.expert, column, 1);
      }
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        if (first_row + row >= tile.rows) continue;
        const int64 sorted_row = tile.row + first_row + row, target = target_row(args, sorted_row);
        if (problem::scattered && target < 0) continue;
        const float scale = scale_of(args, sorted_row), a_scale = a_scale_of(args, sorted_row);
        float value = output_of<ScalarMath>(input_of(sums[row][group] * a_scale, bias, scale),
                                            input_of(sums[row][groups - out_groups + group] * a_scale, up_bias, scale));
        if constexpr (problem::row_scale == RowScale::outputs) value *= scale;
        static_cast<Output*>(args.d)[target * args.d_stride + column] = rounded<problem::output>(value);
      }
    }
  }

  // sums += A[row, k..k+count) * W[k..k+count, column]; w walks along K.
  template <int count, int rows, int groups>
  void add(const Input* const (&a)[rows], const WeightColumns& columns, WeightColumn (&w)[groups], int k, float (&sums)[rows][groups]) const {
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
          if (first + i < count) weights[group][i] = columns.next(w[group]);
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

  static int lesser(int x, int y) { return x < y ? x : y; }
  int64 column_of(int64 first_column, int group) const {
    const int64 column = first_column + group * lanes + lane;
    return column < out_n ? column : out_n - 1;
  }
  const Input* row_of_a(int64 row) const { return static_cast<const Input*>(args.a) + source_row(args, row) * args.a_stride; }

  const Arguments& args;
  const Team& team;
  const int sub_group, lane;
};

}  // namespace moe_xe
