// Xe's matrix instructions apart from block messages: per-lane messages (`asm volatile`, as in xe/blocks.hpp), dpas, and
// what moves registers about.
#pragma once
#include <moe_xe/xe/blocks.hpp>
#include <utility>

extern __attribute__((sycl_device)) unsigned short __spirv_ConvertFToBF16INTEL(float) noexcept;

namespace moe_xe {

// 32 addresses: of four 8-byte pieces of each of 8 rows. They stay in four registers and are changed in place; left to the
// compiler, every load would pack them anew.
class PieceAddresses {
 public:
  PieceAddresses() = default;
  // Of rows 8 * `eight` and on of the 16 rows whose addresses the lanes have.
  template <int eight> [[gnu::always_inline]] static PieceAddresses of(int64 rows, int lane) {
    PieceAddresses pieces;
    asm volatile("{\n.decl PACKED v_type=G type=UD num_elts=64 alias=<%0,0>\n.decl ROWS v_type=G type=UD num_elts=32 alias=<%1,0>\n"
                 "mov (M1_NM,16) PACKED(0,0)<2> ROWS(%2,0)<2;4,0>\nmov (M1_NM,16) PACKED(0,1)<2> ROWS(%2,1)<2;4,0>\n"
                 "mov (M1_NM,16) PACKED(2,0)<2> ROWS(%2,8)<2;4,0>\nmov (M1_NM,16) PACKED(2,1)<2> ROWS(%2,9)<2;4,0>\n}\n"
                 : "=rw"(pieces.packed) : "rw"(rows), "P"(eight));
    pieces.move(int64(lane % 4 * 8));
    return pieces;
  }
  template <int bytes> [[gnu::always_inline]] void move() {
    asm volatile("{\n.decl PACKED v_type=G type=Q num_elts=32 alias=<%0,0>\n"
                 "add (M1_NM,16) PACKED(0,0)<1> PACKED(0,0)<1;1,0> %1:w\n"
                 "add (M1_NM,16) PACKED(2,0)<1> PACKED(2,0)<1;1,0> %1:w\n}\n"
                 : "+rw"(packed) : "P"(bytes));
  }
  // Moves addresses i and 16 + i by lane i's number.
  [[gnu::always_inline]] void move(int64 bytes) {
    asm volatile("{\n.decl PACKED v_type=G type=Q num_elts=32 alias=<%0,0>\n"
                 ".decl BYTES v_type=G type=Q num_elts=16 alias=<%1,0>\n"
                 "add (M1_NM,16) PACKED(0,0)<1> PACKED(0,0)<1;1,0> BYTES(0,0)<1;1,0>\n"
                 "add (M1_NM,16) PACKED(2,0)<1> PACKED(2,0)<1;1,0> BYTES(0,0)<1;1,0>\n}\n"
                 : "+rw"(packed) : "rw"(bytes));
  }
  // The rows' 32 bytes at an offset as dpas operand A.
  template <int byte_offset> [[gnu::always_inline]] vec<int16, 8> load() const {
    vec<int16, 8> rows;
    asm volatile("{\n.decl PACKED v_type=G type=UQ num_elts=32 alias=<%1,0>\n"
                 "lsc_load.ugm (M1_NM,32) %0:d64 flat[PACKED+%2]:a64\n}\n"
                 : "=rw"(rows) : "rw"(packed), "P"(byte_offset));
    return rows;
  }

 private:
  vec<int32, 4> packed;
};

// 32 bytes at each lane's address as dpas operand B: one row for each lane.
template <int byte_offset> [[gnu::always_inline]] inline vec<int32, 8> load_lanes(int64 address) {
  vec<int32, 8> columns;
  asm volatile("lsc_load.ugm (M1,16) %0:d32x8 flat[%1+%2]:a64" : "=rw"(columns) : "rw"(address), "P"(byte_offset));
  return columns;
}
// 16 bytes at each lane's address.
template <int byte_offset> [[gnu::always_inline]] inline vec<int32, 4> load_half_lanes(int64 address) {
  vec<int32, 4> columns;
  asm volatile("lsc_load.ugm (M1,16) %0:d32x4 flat[%1+%2]:a64" : "=rw"(columns) : "rw"(address), "P"(byte_offset));
  return columns;
}

// The 1, 2 or 4 bytes at each lane's address, and no others: the compiler would join neighbours.
template <int bytes> [[gnu::always_inline]] inline unsigned load_lane(int64 address) {
  unsigned value;
  if constexpr (bytes == 1) asm volatile("lsc_load.ugm (M1,16) %0:d8u32 flat[%1]:a64" : "=rw"(value) : "rw"(address));
  else if constexpr (bytes == 2) asm volatile("lsc_load.ugm (M1,16) %0:d16u32 flat[%1]:a64" : "=rw"(value) : "rw"(address));
  else asm volatile("lsc_load.ugm (M1,16) %0:d32 flat[%1]:a64" : "=rw"(value) : "rw"(address));
  return value;
}

// Two 64-bit numbers at each lane's address.
template <int byte_offset> [[gnu::always_inline]] inline vec<int64, 2> load_two(int64 address) {
  vec<int64, 2> numbers;
  asm volatile("lsc_load.ugm (M1,16) %0:d64x2 flat[%1+%2]:a64" : "=rw"(numbers) : "rw"(address), "P"(byte_offset));
  return numbers;
}

// Brings the 64 bytes at each lane's address into the caches.
template <int byte_offset> [[gnu::always_inline]] inline void prefetch_lines(int64 address) {
  asm volatile("lsc_load.ugm.ca.ca (M1,16) %%null:d32 flat[%0+%1]:a64" :: "rw"(address), "P"(byte_offset));
}

// The same value, but the compiler does not know: what each tile computes from it would be kept in registers through all
// tiles, and spill.
[[gnu::always_inline]] inline int unknown(int value) {
  int copy;
  asm volatile("mov (M1,16) %0(0,0)<1> %1(0,0)<1;1,0>" : "=rw"(copy) : "rw"(value));
  return copy;
}

template <class Function, int... i>
[[gnu::always_inline]] inline void unrolled(Function&& function, std::integer_sequence<int, i...>) {
  (function(std::integral_constant<int, i>{}), ...);
}
template <int count, class Function> [[gnu::always_inline]] inline void unrolled(Function&& function) {
  unrolled(function, std::make_integer_sequence<int, count>{});
}

// c += a * b, or c = a * b: 8 rows of 32 bytes of A times 32 bytes deep of B's 16 columns, one column a lane. Of int8, c is int32.
template <bool starts = false, class Rows> [[gnu::always_inline]] inline void dpas(vec<float, 8>& c, Rows a, vec<int32, 8> b) {
  static_assert(sizeof(Rows) == 16);
#define MOE_XE_DPAS(type, sum_type, written, sums)                     \
  asm("{\n.decl ROWS v_type=G type=UD num_elts=64 alias=<%1,0>\n"      \
      ".decl COLUMNS v_type=G type=UD num_elts=128 alias=<%2,0>\n"     \
      ".decl SUMS v_type=G type=" sum_type " num_elts=128 alias=<%0,0>\n" \
      "dpas." type "." type ".8.8 (M1,16) SUMS.0 " sums " COLUMNS.0 ROWS(0,0)\n}\n" : written "rw"(c) : "rw"(a), "rw"(b))
#define MOE_XE_DPAS_OF(type, sum_type)                                 \
  do {                                                                 \
    if constexpr (starts) MOE_XE_DPAS(type, sum_type, "=", "%%null.0");  \
    else MOE_XE_DPAS(type, sum_type, "+", "SUMS.0");                   \
  } while (false)
  if constexpr (problem::input == Dtype::bf16) MOE_XE_DPAS_OF("bf", "F");
  else if constexpr (problem::input == Dtype::f16) MOE_XE_DPAS_OF("hf", "F");
  else if constexpr (problem::input == Dtype::i8) MOE_XE_DPAS_OF("s8", "D");
  else MOE_XE_DPAS_OF("tf32", "F");  // reads the upper 19 bits of a float: inputs are truncated, not rounded, to tf32
#undef MOE_XE_DPAS_OF
#undef MOE_XE_DPAS
}

// Volatile: equal ones would be copies of one block.
[[gnu::always_inline]] inline vec<float, 8> zeros() {
  vec<float, 8> block;
  asm volatile("{\nmov (M1_NM,32) %0(0,0)<1> 0x0:f\nmov (M1_NM,32) %0(2,0)<1> 0x0:f\n"
      "mov (M1_NM,32) %0(4,0)<1> 0x0:f\nmov (M1_NM,32) %0(6,0)<1> 0x0:f\n}\n" : "=rw"(block));
  return block;
}

// The bits of a 16-bit output, by the machine's own conversion.
[[gnu::always_inline]] inline int16 round_to_output(float value) {
  if constexpr (problem::output == Dtype::f16) return __builtin_bit_cast(int16, _Float16(value));
  else return int16(__spirv_ConvertFToBF16INTEL(value));
}

// The even and the odd lanes of `low`, then of `high`: pairs of neighbouring columns apart.
[[gnu::always_inline]] inline void unweave(vec<float, 8> low, vec<float, 8> high, vec<float, 8>& even, vec<float, 8>& odd) {
#define MOE_XE_UNWEAVE_ROW(row)                                                                                   \
  "mov (M1_NM,8) EVEN(" row ",0)<1> LOW(" row ",0)<2;1,0>\nmov (M1_NM,8) EVEN(" row ",8)<1> HIGH(" row ",0)<2;1,0>\n" \
  "mov (M1_NM,8) ODD(" row ",0)<1> LOW(" row ",1)<2;1,0>\nmov (M1_NM,8) ODD(" row ",8)<1> HIGH(" row ",1)<2;1,0>\n"
  asm("{\n.decl EVEN v_type=G type=F num_elts=128 alias=<%0,0>\n.decl ODD v_type=G type=F num_elts=128 alias=<%1,0>\n"
      ".decl LOW v_type=G type=F num_elts=128 alias=<%2,0>\n.decl HIGH v_type=G type=F num_elts=128 alias=<%3,0>\n"
      MOE_XE_UNWEAVE_ROW("0") MOE_XE_UNWEAVE_ROW("1") MOE_XE_UNWEAVE_ROW("2") MOE_XE_UNWEAVE_ROW("3")
      MOE_XE_UNWEAVE_ROW("4") MOE_XE_UNWEAVE_ROW("5") MOE_XE_UNWEAVE_ROW("6") MOE_XE_UNWEAVE_ROW("7") "}\n"
      : "=rw"(even), "=rw"(odd) : "rw"(low), "rw"(high));
#undef MOE_XE_UNWEAVE_ROW
}

// Elements [part * width, (part + 1) * width).
template <int part, int width, class T, int size>
[[gnu::always_inline]] inline vec<T, width> slice(vec<T, size> values) {
  vec<T, width> result;
#pragma unroll
  for (int i = 0; i < width; ++i) result[i] = values[part * width + i];
  return result;
}

}  // namespace moe_xe
