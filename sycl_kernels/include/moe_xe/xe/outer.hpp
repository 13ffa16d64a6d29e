// A tile of the weights' gradient on Xe's matrix engines. dpas' right operand loads as it lies (VNNI pairs of rows). Its
// left operand needs consecutive rows in a dword, and block messages transpose 32-bit elements only: even and odd rows
// load apart, as pairs of columns, and three moves of half dwords make four rows of the operand. So an operand has the
// first or the second columns of 8 pairs. A gathered operand is always the left one, as each lane can load a row of its
// own; if that is `right`, the product is d^T and each lane stores a row of d.
//
// What the host guarantees: as in xe/mainloop.hpp; rows of the left operand and of d are multiples of 64 bytes apart;
// columns of a gathered operand are a multiple of 16.
#pragma once
#include <moe_xe/xe/row_products.hpp>
#include <moe_xe/scalar.hpp>
#include <moe_xe/gpu/team.hpp>

namespace moe_xe {

// One sub-group's part of a tile.
class SubGroupOuter {
  using Output = Element<problem::output>;

 public:
  [[gnu::always_inline]] SubGroupOuter(const OuterArguments& args, const OuterTile& tile, int sub_group, int lane)
      : args(args), tile(tile), sub_group(sub_group), lane(lane),
        first_a((swapped ? tile.column : tile.row) + sub_group / (tile_b / b_part) * a_part),
        first_b((swapped ? tile.row : tile.column) + sub_group % (tile_b / b_part) * b_part) {
    for (auto& blocks : sums)
      for (auto& block : blocks) block = 0.0f;
  }

  [[gnu::always_inline]] void run() {
    if constexpr (in_runs) add_runs();
    else add(tile.begin, tile.end);
    if constexpr (swapped) store_columns();
    else store_rows();
  }

 private:
  [[gnu::always_inline]] void add(int64 begin, int64 end) {
    RowProducts(args, tile, begin, end, sub_group, lane, first_a, first_b).add_to(sums);
  }

  // Of each run, those rows that are the tile's.
  [[gnu::always_inline]] void add_runs() {
#pragma unroll 1
    for (int rank = 0; rank < problem::ranks; ++rank) {
      const Record run = tile.runs[rank];
      const int first = Team::uniform(run.x), before = Team::uniform(run.z), rows = Team::uniform(run.y) - first;
      const int64 begin = tile.begin > before ? tile.begin - before : 0, end = tile.end < before + rows ? tile.end - before : rows;
      if (begin < end) add(first + begin, first + end);
    }
  }

  // Row of an operand that holds the pair of columns `pair` (of 8).
  static constexpr int row_of_pair(int pair) { return !lanes_gather ? pair : pair < 4 ? 2 * pair : 2 * pair - 7; }

  char* d_of_tile() const {
    return static_cast<char*>(args.d) + (tile.expert * args.d_expert_stride + tile.split * args.d_split_stride) * size_of(problem::output);
  }

  // Rows of d of one parity are a surface of their own, too.
  [[gnu::always_inline]] void store_rows() {
    constexpr int bytes = size_of(problem::output), columns = bytes == 4 ? 16 : 32;
    constexpr bool row_by_row = bytes == 4 && lanes_gather && !problem::accumulate;
    unrolled<2>([&](auto parity) __attribute__((always_inline)) {
      const int pitch = int(args.d_stride) * bytes;
      const Surface surface{d_of_tile() + parity * pitch, int(problem::q) * bytes, int(problem::p + 1 - parity) / 2, 2 * pitch};
      const Block block(surface, first_b, first_a / 2, columns, row_by_row ? 1 : 8, 1);
      unrolled<a_blocks / 2>([&](auto group) __attribute__((always_inline)) {
        constexpr int i = 2 * group + parity;
        unrolled<b_part / columns>([&](auto j) __attribute__((always_inline)) {
          if constexpr (row_by_row) {
            unrolled<8>([&](auto pair) __attribute__((always_inline)) {   // a copy of all rows in order would spill
              block.template store_row<j * 16, group * 8 + pair>(sums[i][j][row_of_pair(pair)]);
            });
          } else if constexpr (bytes == 4) {
            vec<float, 8> rows;
            unrolled<8>([&](auto pair) __attribute__((always_inline)) { rows[int(pair)] = with_previous<i, j, pair>(); });
            block.template store<j * 16, group * 8>(rows);
          } else {
            vec<int16, 16> rows;
            unrolled<16>([&](auto at) __attribute__((always_inline)) {
              rows[int(at)] = round_to_output(with_previous<i, 2 * j + at % 2, at / 2>());
            });
            block.template store<j * 32, group * 8>(rows);
          }
        });
      });
    });
  }

  // The sum of block (i, j) and one pair of columns, plus what d holds there if that is asked for.
  template <int i, int j, int pair> [[gnu::always_inline]] float with_previous() const {
    float value = sums[i][j][row_of_pair(pair)];
    if constexpr (problem::accumulate) {
      const int row = first_a + i / 2 * 16 + 2 * pair + i % 2, column = first_b + j * 16 + lane;
      if (row < problem::p && column < problem::q)
        value += widened<problem::output>(reinterpret_cast<const Output*>(d_of_tile())[row * args.d_stride + column]);
    }
    return value;
  }

  // d^T: a lane has a row of d, whose columns are in its registers.
  [[gnu::always_inline]] void store_columns() {
    using Piece = vec<std::conditional_t<problem::output == Dtype::f32, float, int16>, 8> __attribute__((aligned(16)));
    unrolled<b_blocks>([&](auto j) __attribute__((always_inline)) {
      const int row = first_b + j * 16 + lane;
      if (row >= problem::p) return;
      Output* d = reinterpret_cast<Output*>(d_of_tile()) + row * args.d_stride + first_a;
      unrolled<a_part / 8>([&](auto eight) __attribute__((always_inline)) {
        if (first_a + eight * 8 >= problem::q) return;
        Piece* place = reinterpret_cast<Piece*>(d + eight * 8);
        Piece previous, rounded;
        if constexpr (problem::accumulate) previous = *place;
        unrolled<8>([&](auto c) __attribute__((always_inline)) {
          constexpr int column = eight * 8 + c, pair = column % 16 / 2;
          float value = sums[column / 16 * 2 + column % 2][j][row_of_pair(pair)];
          if constexpr (problem::accumulate) {
            const auto element = previous[int(c)];   // a bit cast of a vector's element itself takes the first one
            value += widened<problem::output>(__builtin_bit_cast(Output, element));
          }
          if constexpr (problem::output == Dtype::f32) rounded[int(c)] = value;
          else rounded[int(c)] = round_to_output(value);
        });
        *place = rounded;
      });
    });
  }

  const OuterArguments& args;
  const OuterTile& tile;
  int sub_group, lane, first_a, first_b;
  OuterSums sums;
};

class OuterMainloop {
 public:
  OuterMainloop(const OuterArguments& args, const Team& team) : args(args), sub_group(team.sub_group), lane(team.lane()) {}

  [[gnu::always_inline]] void run(const OuterTile& tile) const { SubGroupOuter(args, tile, sub_group, unknown(lane)).run(); }

 private:
  const OuterArguments& args;
  const int sub_group, lane;
};

}  // namespace moe_xe
