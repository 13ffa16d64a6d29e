// A tile of the weights' gradient on Xe's matrix engines. dpas' right operand loads as it lies (VNNI pairs of rows). Its
// left operand needs consecutive rows in a dword, and block messages transpose 32-bit elements only: even and odd rows
// load apart, as pairs of columns, and three moves of half dwords make four rows of the operand. So an operand has the
// first or the second columns of 8 pairs. A gathered operand is always the left one, as each lane can load a row of its
// own; if that is `right`, the product is d^T and each lane stores a row of d.
//
// What the host guarantees: as in xe/mainloop.hpp; rows of the left operand and of d are multiples of 64 bytes apart;
// columns of a gathered operand are a multiple of 16.
#pragma once
#include <moe_xe/xe/atoms.hpp>
#include <moe_xe/outer_types.hpp>
#include <moe_xe/scalar.hpp>
#include <moe_xe/gpu/tile_runs.hpp>

namespace moe_xe {

constexpr bool swapped = problem::gathered == Gathered::right;
constexpr bool lanes_gather = problem::gathered != Gathered::none;
constexpr int64 a_columns = swapped ? problem::q : problem::p, b_columns = swapped ? problem::p : problem::q;
constexpr int a_part = swapped ? config::sub_group_columns : config::sub_group_rows;
constexpr int b_part = swapped ? config::sub_group_rows : config::sub_group_columns;
constexpr int tile_a = swapped ? config::tile_columns : config::tile_rows, tile_b = swapped ? config::tile_rows : config::tile_columns;
constexpr int outer_sub_groups = tile_a / a_part * (tile_b / b_part);
constexpr int row_step = 32;     // sorted rows
static_assert(size_of(problem::input) == 2 && a_part % 16 == 0 && b_part % 32 == 0);

// Prefetch of an operand's rows: 64-byte lines of the whole tile's columns, shared out to the sub-groups.
template <int columns> class RowPrefetch {
  static constexpr int lines = columns / 32, messages = lines > outer_sub_groups ? lines / outer_sub_groups : 1;
  static constexpr int across = lines / messages, sharers = outer_sub_groups / across;
  static constexpr int down = sharers >= 4 ? 4 : sharers >= 2 ? 2 : 1, rows = row_step / down;
  static_assert(across * messages * 32 == columns && across <= outer_sub_groups);

 public:
  [[gnu::always_inline]] RowPrefetch(const Surface& surface, int column, int row, int sub_group)
      : block(surface, column + sub_group % across * 32, row + sub_group / across % down * rows, 32, rows, 1) {
    unrolled<config::prefetch_distance>([&](auto) __attribute__((always_inline)) { step(); });
  }
  [[gnu::always_inline]] void step() const {
    unrolled<messages>([&](auto i) __attribute__((always_inline)) { block.template prefetch<rows, i * across * 32, 0>(); });
    block.move_y(row_step);
  }

 private:
  Block block;
};

// Gathered rows are not neighbours.
struct NoPrefetch {
  [[gnu::always_inline]] NoPrefetch(const Surface&, int, int, int) {}
  [[gnu::always_inline]] void step() const {}
};

constexpr int a_blocks = a_part / 8, b_blocks = b_part / 16;
using OuterSums = vec<float, 8>[a_blocks][b_blocks];

// The products of sorted rows that are neighbours, of one sub-group's columns.
class RowProducts {
 public:
  // first_a, first_b: the sub-group's first columns.
  [[gnu::always_inline]] RowProducts(const OuterArguments& args, const OuterTile& tile, int64 begin, int64 end, int sub_group, int lane,
                                     int first_a, int first_b)
      : args(args), begin(begin), end(end), lane(lane), first_a(first_a),
        even_rows(rows_of_parity(0)), odd_rows(rows_of_parity(1)), b(b_surface(), first_b, int(begin), 16, 32, 2),
        a_prefetch(a_surface(), swapped ? tile.column : tile.row, int(begin), sub_group),
        b_prefetch(b_surface(), swapped ? tile.row : tile.column, int(begin), sub_group) {
    // Lanes 0..7 and 8..15 share rows. Columns beyond the operand's read its last ones, and are never stored.
    const int column = first_a < a_columns - 16 ? first_a : int(a_columns) - 16;
    place_in_row = column * 2 + lane / 8 * 16;
    addresses = reinterpret_cast<int64>(args.row_addresses + begin + lane % 8 * 2);
  }

  [[gnu::always_inline]] void add_to(OuterSums& sums) {
    const int rows = int(end - begin);
    const int whole = lanes_gather ? rows / row_step : (rows + row_step - 1) / row_step;   // surfaces end in zeros
#pragma unroll 1
    for (int step = 0; step < whole; ++step) add<false>(step * row_step, sums);
    if constexpr (lanes_gather)
      if (whole * row_step < rows) add<true>(whole * row_step, sums);
  }

 private:
  // Empty experts in front end at row 0, and no surface is empty.
  int height() const { return end > 0 ? int(end) : 1; }
  Surface a_surface() const {
    return {swapped ? args.right : args.left, int(a_columns) * 2, height(), int(swapped ? args.right_stride : args.left_stride) * 2};
  }
  Surface b_surface() const {
    return {swapped ? args.left : args.right, int(b_columns) * 2, height(), int(swapped ? args.left_stride : args.right_stride) * 2};
  }

  // The left operand's rows of one parity as a surface of their own, from the first row on.
  [[gnu::always_inline]] Block rows_of_parity(int parity) const {
    const Surface all = a_surface();
    const int count = (int(end - begin) + 1 - parity) / 2;
    const Surface half{static_cast<const char*>(all.base) + (begin + parity) * all.pitch_bytes, all.width_bytes,
                       count > 0 ? count : 1, 2 * all.pitch_bytes};
    return Block(half, first_a / 2, count > 0 ? 0 : 1, 8, 8, 1);
  }

  // 32 sorted rows: two dpas deep. `tail`: fewer of them exist.
  template <bool tail> [[gnu::always_inline]] void add(int row, OuterSums& sums) {
    vec<int32, 32> right[b_blocks / 2];
    unrolled<b_blocks / 2>([&](auto j) __attribute__((always_inline)) { right[j] = b.template load_vnni<32, j * 32, 0>(); });
    b_prefetch.step();
    a_prefetch.step();
    unrolled<2>([&](auto half) __attribute__((always_inline)) {
      vec<int32, 4> left[a_blocks];
      load_left<tail, half>(row, left);
      unrolled<b_blocks>([&](auto j) __attribute__((always_inline)) {
        unrolled<a_blocks>([&](auto i) __attribute__((always_inline)) {
          dpas(sums[i][j], left[i], slice<j % 2 * 2 + half, 8>(right[j / 2]));
        });
      });
    });
    b.move_y(row_step);
    if constexpr (lanes_gather) {
      addresses += row_step * sizeof(int64);
    } else {
      even_rows.move_y(row_step / 2);
      odd_rows.move_y(row_step / 2);
    }
  }

  // 16 rows of the left operand. Rows past the last one repeat it, where lanes gather: what they multiply is zero.
  template <bool tail, int half> [[gnu::always_inline]] void load_left(int row, vec<int32, 4> (&left)[a_blocks]) const {
    vec<int64, 2> at = 0;    // addresses of the lane's even and odd row
    if constexpr (lanes_gather && tail) {
      at[0] = *last_address(row + half * 16 + lane % 8 * 2);
      at[1] = *last_address(row + half * 16 + lane % 8 * 2 + 1);
    } else if constexpr (lanes_gather) {
      at = load_two<half * 128>(addresses);
    }
    at += place_in_row;
    unrolled<a_blocks / 2>([&](auto i) __attribute__((always_inline)) {
      if constexpr (!lanes_gather) {
        load_columns_apart<i * 8, half * 8>(even_rows, odd_rows, left[2 * i], left[2 * i + 1]);
      } else if constexpr (a_columns % a_part == 0) {
        load_columns_apart<i * 32>(at[0], at[1], left[2 * i], left[2 * i + 1]);
      } else {
        const int bytes = first_a + i * 16 < a_columns ? i * 32 : 0;
        load_columns_apart<0>(at[0] + bytes, at[1] + bytes, left[2 * i], left[2 * i + 1]);
      }
    });
  }

  // The entry of one of the rows, or of the last one.
  const int64* last_address(int row) const {
    const int last = int(end - begin) - 1;
    return args.row_addresses + begin + (row < last ? row : last);
  }

  const OuterArguments& args;
  const int64 begin, end;
  int lane, first_a;
  int64 place_in_row, addresses;   // of gathered rows: bytes; entries of the lane's next two in the table
  Block even_rows, odd_rows, b;
  std::conditional_t<lanes_gather, NoPrefetch, RowPrefetch<tile_a>> a_prefetch;
  RowPrefetch<tile_b> b_prefetch;
};

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
    for_each_run(tile, [&](int64 begin, int64 end) __attribute__((always_inline)) {
      RowProducts(args, tile, begin, end, sub_group, lane, first_a, first_b).add_to(sums);
    });
    if constexpr (swapped) store_columns();
    else store_rows();
  }

 private:
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
