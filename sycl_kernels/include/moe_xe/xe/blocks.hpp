// Xe's 2D block messages, one inline function each. Loads are `asm volatile`: the compiler merges plain asm loads whose
// operands look alike.
#pragma once
#include <moe_xe/types.hpp>

namespace moe_xe {

template <class T, int size> using vec = T __attribute__((ext_vector_type(size)));

extern "C" __attribute__((sycl_device)) int* __builtin_IB_subgroup_createBlock2DAddressPayload(
    long base, int width_bytes_minus_1, int height_minus_1, int pitch_bytes_minus_1, int x, int y, int block_width,
    int block_height, int blocks);
extern "C" __attribute__((sycl_device)) void __builtin_IB_subgroup_addBlock2DAddressPayloadBlockX(int*, int);
extern "C" __attribute__((sycl_device)) void __builtin_IB_subgroup_addBlock2DAddressPayloadBlockY(int*, int);
extern "C" __attribute__((sycl_device)) void __builtin_IB_subgroup_setBlock2DAddressPayloadBlockY(int*, int);

// A matrix in memory. Block loads give zeros outside [0, width) x [0, height), block stores leave it untouched. The
// base is 64-byte aligned, the pitch a multiple of 16 bytes, the width at least 64 bytes.
struct Surface {
  const void* base;
  int width_bytes;
  int height;
  int pitch_bytes;
};

// Where a 2D block message reads or writes; x counts elements of the message. IGC writes a surface's height only once
// if it is changed in a loop, so that a new tile needs a new Block.
class Block {
 public:
  [[gnu::always_inline]] Block(const Surface& surface, int x, int y, int width, int height, int count)
      : payload(__builtin_IB_subgroup_createBlock2DAddressPayload(
            reinterpret_cast<long>(surface.base), surface.width_bytes - 1, surface.height - 1, surface.pitch_bytes - 1,
            x, y, width, height, count)) {}
  [[gnu::always_inline]] void move_x(int by) const { __builtin_IB_subgroup_addBlock2DAddressPayloadBlockX(payload, by); }
  [[gnu::always_inline]] void move_y(int by) const { __builtin_IB_subgroup_addBlock2DAddressPayloadBlockY(payload, by); }
  [[gnu::always_inline]] void set_y(int y) const { __builtin_IB_subgroup_setBlock2DAddressPayloadBlockY(payload, y); }

  // `height` rows of 64 bytes as two dpas operands A: 32 bytes of all rows, then the other 32 bytes.
  template <int height, int x, int y> [[gnu::always_inline]] vec<int16, 2 * height> load_rows() const {
    vec<int16, 2 * height> rows;
    asm volatile("lsc_load_block2d.ugm (M1,1) %0:d16.2x16x%4nn flat[%1+(%2,%3)]"
                 : "=rw"(rows) : "rw.u"(payload), "P"(x), "P"(y), "P"(height));
    return rows;
  }
  // `blocks` times `width` bytes of `height` rows, one block after the other, each row after row.
  template <int blocks, int width, int height, int x, int y>
  [[gnu::always_inline]] vec<int32, blocks * width * height / 64> load_bytes() const {
    vec<int32, blocks * width * height / 64> bytes;
    asm volatile("lsc_load_block2d.ugm (M1,1) %0:d8.%4x%5x%6nn flat[%1+(%2,%3)]"
                 : "=rw"(bytes) : "rw.u"(payload), "P"(x), "P"(y), "P"(blocks), "P"(width), "P"(height));
    return bytes;
  }
  // 16 rows of 32 bytes as dpas operand B: one row for each lane.
  template <int x, int y> [[gnu::always_inline]] vec<int32, 8> load_transposed() const {
    vec<int32, 8> columns;
    asm volatile("lsc_load_block2d.ugm (M1,1) %0:d32.8x16tn flat[%1+(%2,%3)]"
                 : "=rw"(columns) : "rw.u"(payload), "P"(x), "P"(y));
    return columns;
  }
  // 32 rows of 16-bit elements as dpas operands B: rows 0..15 and 16..31 of the first 16 columns, then of the next.
  template <int columns, int x, int y> [[gnu::always_inline]] vec<int32, columns> load_vnni() const {
    vec<int32, columns> pairs;
    asm volatile("lsc_load_block2d.ugm (M1,1) %0:d16.%4x16x32nt flat[%1+(%2,%3)]"
                 : "=rw"(pairs) : "rw.u"(payload), "P"(x), "P"(y), "P"(columns / 16));
    return pairs;
  }
  // 16 rows of 16 32-bit elements as two dpas operands B: rows 0..7 and 8..15.
  template <int x, int y> [[gnu::always_inline]] vec<int32, 16> load_words() const {
    vec<int32, 16> words;
    asm volatile("lsc_load_block2d.ugm (M1,1) %0:d32.16x16nn flat[%1+(%2,%3)]"
                 : "=rw"(words) : "rw.u"(payload), "P"(x), "P"(y));
    return words;
  }
  // Brings `height` rows of 64 bytes into the caches.
  template <int height, int x, int y> [[gnu::always_inline]] void prefetch() const {
    asm volatile("lsc_load_block2d.ugm.ca.ca (M1,1) %%null:d16.32x%3nn flat[%0+(%1,%2)]"
                 :: "rw.u"(payload), "P"(x), "P"(y), "P"(height));
  }
  // 8 rows of 16 or 32 16-bit elements, or of 16 32-bit elements.
  template <int x, int y, int count> [[gnu::always_inline]] void store(vec<int16, count> rows) const {
    asm volatile("lsc_store_block2d.ugm (M1,1) flat[%1+(%2,%3)] %0:d16.%4x8nn"
                 :: "rw"(rows), "rw.u"(payload), "P"(x), "P"(y), "P"(count * 2));
  }
  template <int x, int y> [[gnu::always_inline]] void store(vec<float, 8> rows) const {
    asm volatile("lsc_store_block2d.ugm (M1,1) flat[%1+(%2,%3)] %0:d32.16x8nn"
                 :: "rw"(rows), "rw.u"(payload), "P"(x), "P"(y));
  }
  // One row of 16 or 32 16-bit elements, or of 16 32-bit elements.
  template <int x, int y, int count> [[gnu::always_inline]] void store_row(vec<int16, count> row) const {
    asm volatile("lsc_store_block2d.ugm (M1,1) flat[%1+(%2,%3)] %0:d16.%4x1nn"
                 :: "rw"(row), "rw.u"(payload), "P"(x), "P"(y), "P"(count * 16));
  }
  template <int x, int y> [[gnu::always_inline]] void store_row(float row) const {
    asm volatile("lsc_store_block2d.ugm (M1,1) flat[%1+(%2,%3)] %0:d32.16x1nn"
                 :: "rw"(row), "rw.u"(payload), "P"(x), "P"(y));
  }
  template <int x, int y> friend void load_columns_apart(const Block&, const Block&, vec<int32, 4>&, vec<int32, 4>&);

 private:
  int* payload;
};

// dpas operands A whose 16 elements along K are rows: 8 of the even and of the odd rows load apart, as pairs of 16-bit
// columns (32 bytes a pair), and trade halves of their dwords. `first` has the first columns of the 8 pairs, `second` the
// others.
#define MOE_XE_TRADE_HALVES                                                                                            \
  "mov (M1_NM,32) KEPT(0,1)<2> FIRST(0,1)<2;1,0>\nmov (M1_NM,32) KEPT(2,1)<2> FIRST(2,1)<2;1,0>\n"                     \
  "mov (M1_NM,32) FIRST(0,1)<2> SECOND(0,0)<2;1,0>\nmov (M1_NM,32) FIRST(2,1)<2> SECOND(2,0)<2;1,0>\n"                 \
  "mov (M1_NM,32) SECOND(0,0)<2> KEPT(0,1)<2;1,0>\nmov (M1_NM,32) SECOND(2,0)<2> KEPT(2,1)<2;1,0>\n}\n"
#define MOE_XE_HALVES                                                                                                  \
  "{\n.decl FIRST v_type=G type=UW num_elts=128 alias=<%0,0>\n.decl SECOND v_type=G type=UW num_elts=128 alias=<%1,0>\n" \
  ".decl KEPT v_type=G type=UW num_elts=128\n"

template <int x, int y>
[[gnu::always_inline]] inline void load_columns_apart(const Block& even, const Block& odd, vec<int32, 4>& first, vec<int32, 4>& second) {
  asm volatile(MOE_XE_HALVES "lsc_load_block2d.ugm (M1,1) %0:d32.8x8tn flat[%2+(%4,%5)]\n"
               "lsc_load_block2d.ugm (M1,1) %1:d32.8x8tn flat[%3+(%4,%5)]\n" MOE_XE_TRADE_HALVES
               : "=rw"(first), "=rw"(second) : "rw.u"(even.payload), "rw.u"(odd.payload), "P"(x), "P"(y));
}
// The same, each lane with an address of its own: lanes 0..7 are the rows' pairs 0..3, lanes 8..15 their pairs 4..7.
template <int byte_offset>
[[gnu::always_inline]] inline void load_columns_apart(int64 even, int64 odd, vec<int32, 4>& first, vec<int32, 4>& second) {
  asm volatile(MOE_XE_HALVES "lsc_load.ugm (M1,16) %0:d32x4 flat[%2+%4]:a64\nlsc_load.ugm (M1,16) %1:d32x4 flat[%3+%4]:a64\n"
               MOE_XE_TRADE_HALVES : "=rw"(first), "=rw"(second) : "rw"(even), "rw"(odd), "P"(byte_offset));
}
#undef MOE_XE_TRADE_HALVES
#undef MOE_XE_HALVES

}  // namespace moe_xe
