// Codes and scales of quantised weights as vectors of numbers: what operands/expert_codes.hpp has for one at a time.
#pragma once
#include <moe_xe/operands/expert_codes.hpp>
#include <moe_xe/cpu/micro_kernel.hpp>

namespace moe_xe {

template <class T, int count> using Several = T __attribute__((ext_vector_type(count)));

// 8-bit codes as floats; numbers are `code_unit` times as large.
constexpr float code_unit = problem::codes == Codes::e4m3 ? 256.f : 1.f;
static_assert(code_unit == 1.f || !problem::has_zeros, "zeros are in units of codes");
template <Codes codes, int count> Several<float, count> floats_of_bytes(const void* from) {
  using Bits = Several<short, count>;
  using Numbers = Several<float, count>;
  const auto bytes = load<Several<signed char, count>>(from);
  if constexpr (codes == Codes::int8) return __builtin_convertvector(bytes, Numbers);
  else {
    Bits bits = __builtin_convertvector(bytes, Bits) << (codes == Codes::e5m2 ? 8 : 7);
    // e4m3 as fp16, whose exponents are 8 larger. Bit 14, a copy of the sign, becomes zero; 0x7f and 0xff carry into it, which makes NaN.
    if constexpr (codes == Codes::e4m3) bits ^= (bits + short(0x80)) & short(0x4000);
    return __builtin_convertvector(__builtin_bit_cast(Several<_Float16, count>, bits), Numbers);
  }
}

// Whether codes are whole numbers, of which dot products are sums of integers (cpu/code_words.hpp).
constexpr bool integer_dots = quantised && problem::codes != Codes::e4m3 && problem::codes != Codes::e5m2;

// Rounded to bf16, in their order.
inline Dwords rounded_pairs(Floats first, Floats second) {
  Dwords pairs;
  asm("vcvtne2ps2bf16 %2,%1,%0" : "=v"(pairs) : "v"(second), "v"(first));
  return pairs;
}

// Elements of a row of scales or zeros.
template <int count> Several<float, count> grid_values(const unsigned char* from) {
  using Values = Several<float, count>;
  using Bits = Several<unsigned, count>;
  if constexpr (problem::scale_type == ScaleType::f32) return load<Values>(from);
  else if constexpr (problem::scale_type == ScaleType::f16) return __builtin_convertvector(load<Several<_Float16, count>>(from), Values);
  else if constexpr (problem::scale_type == ScaleType::e4m3) return floats_of_bytes<Codes::e4m3, count>(from) * 256.f;
  else if constexpr (problem::scale_type == ScaleType::bf16)
    return __builtin_bit_cast(Values, __builtin_convertvector(load<Several<unsigned short, count>>(from), Bits) << 16);
  else {
    const Bits bits = __builtin_convertvector(load<Several<unsigned char, count>>(from), Bits) << 23;
    const Values values = __builtin_bit_cast(Values, bits == 0u ? Bits(0x400000u) : bits);
    return values * 0.f + values;   // 255: an infinity, which becomes NaN
  }
}

inline Floats grid_values(const unsigned char* from, int count) {
  if (count >= width) return grid_values<width>(from);
  constexpr int size = size_of(problem::scale_type);
  return grid_values<width>(Partial<unsigned char, width * size>(from, count * size).element);
}

// The zero of all codes, which numbers below are less by.
constexpr float common_zero = problem::has_zeros ? 0.f : problem::zero;

// Lane i, modulo 16: the number of 4-bit code i.
inline Floats number_table() {
  Floats table;
#pragma unroll
  for (int i = 0; i < width; ++i) table[i] = number_of<problem::codes>(i % 16) - common_zero;
  return table;
}

inline Floats look_up(Floats table, Dwords codes) {
  Floats numbers;
  asm("vpermps %2,%1,%0" : "=v"(numbers) : "v"(codes), "v"(table));
  return numbers;
}

// Numbers of the lowest four bits of each lane. vpermps looks at as many bits as the table has lanes for.
inline Floats numbers_of(Dwords codes) {
  if constexpr (wide) return look_up(number_table(), codes);
  Floats numbers;
  if constexpr (problem::codes == Codes::int4) numbers = __builtin_convertvector(__builtin_bit_cast(Vector<int>, codes << 28) >> 28, Floats);
  else if constexpr (problem::codes == Codes::uint4) numbers = __builtin_convertvector(__builtin_bit_cast(Vector<int>, codes & 15u), Floats);
  else {
    Floats size;
    if constexpr (config::isa == Isa::avx2) size = look_up(number_table(), codes);
    else {
      size = __builtin_bit_cast(Floats, ((codes & 7u) << 22) + (126u << 23));     // as if 0 and 0.5 were normal: 0.5 and 0.75
      size = size < 1.f ? 2.f * size - 1.f : size;
    }
    numbers = __builtin_bit_cast(Floats, __builtin_bit_cast(Dwords, size) | (codes & 8u) << 28);
  }
  return common_zero == 0.f ? numbers : numbers - common_zero;
}

// Numbers of `width` codes from an even one on, in units of code_unit.
inline Floats numbers_at(const unsigned char* codes, int64 column) {
  if constexpr (code_bits == 4) {
    using Raw = std::conditional_t<width == 4, unsigned short, unsigned>;
    const unsigned char* from = codes + column / 2;
    Dwords raw, shift;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      raw[i] = load<Raw>(from + i / 8 * 4);
      shift[i] = i % 8 * 4;
    }
    return numbers_of(raw >> shift);
  } else {
    const Floats numbers = floats_of_bytes<problem::codes, width>(codes + column);
    return common_zero == 0.f ? numbers : numbers - common_zero;
  }
}

}  // namespace moe_xe
