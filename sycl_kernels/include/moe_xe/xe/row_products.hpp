// Products of sorted rows that are neighbours, for the weights' gradient on Xe's matrix engines (xe/outer.hpp): an operand's loads and
// dpas, 32 rows a step.
#pragma once
#include <moe_xe/xe/atoms.hpp>
#include <moe_xe/outer_types.hpp>

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
    if constexpr (in_runs) {    // a loop in a loop: with steps that may be none, or a tail of its own, all sums would be copied
      int row = 0;
#pragma unroll 1
      do add<lanes_gather>(row, sums);
      while ((row += row_step) < rows);
      return;
    }
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

}  // namespace moe_xe
