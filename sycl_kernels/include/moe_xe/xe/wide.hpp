// fp32 arithmetic on eight registers of 16 lanes, two of them an instruction: half as many as on floats. The operations are
// those of activation.hpp.
#pragma once
#include <moe_xe/activation.hpp>
#include <moe_xe/xe/atoms.hpp>

namespace moe_xe {

struct Wide {
  vec<float, 8> values;
};
// The same number for all registers of a lane.
struct OfLanes {
  [[gnu::always_inline]] explicit OfLanes(float number) : twice(number) {}
  vec<float, 2> twice;
};

#define MOE_XE_X(row) " %1(" row ",0)<1;1,0>"
#define MOE_XE_MINUS_X(row) " (-)%1(" row ",0)<1;1,0>"
#define MOE_XE_ABS_X(row) " (abs)%1(" row ",0)<1;1,0>"
#define MOE_XE_Y(row) " %2(" row ",0)<1;1,0>"
#define MOE_XE_NUMBER(row) " %2(0,0)<0;1,0>"
#define MOE_XE_OF_LANES(row) " %2(0,0)<1;1,0>"
#define MOE_XE_NOTHING(row)
#define MOE_XE_LINE(op, row, first, second) op " (M1_NM,32) %0(" row ",0)<1>" first(row) second(row) "\n"
#define MOE_XE_WIDE(op, first, second, ...)                                                                                  \
  Wide result;                                                                                                               \
  asm("{\n" MOE_XE_LINE(op, "0", first, second) MOE_XE_LINE(op, "2", first, second) MOE_XE_LINE(op, "4", first, second)       \
      MOE_XE_LINE(op, "6", first, second) "}\n" : "=rw"(result.values) : "rw"(x.values) __VA_OPT__(,) __VA_ARGS__);             \
  return result
// The lanes of `kept`, where the comparison holds, else those of `other`.
#define MOE_XE_SELECT_LINE(compare, row, left, right, kept, other)                                \
  compare " (M1_NM,32) P" left(row) right(row) "\n(P) " MOE_XE_LINE("sel", row, kept, other)
#define MOE_XE_SELECT(compare, left, right, kept, other, ...)                                                                \
  Wide result;                                                                                                               \
  asm("{\n.decl P v_type=P num_elts=32\n"                                                                                     \
      MOE_XE_SELECT_LINE(compare, "0", left, right, kept, other) MOE_XE_SELECT_LINE(compare, "2", left, right, kept, other)    \
      MOE_XE_SELECT_LINE(compare, "4", left, right, kept, other) MOE_XE_SELECT_LINE(compare, "6", left, right, kept, other)    \
      "}\n" : "=rw"(result.values) : "rw"(x.values), __VA_ARGS__);                                                             \
  return result

[[gnu::always_inline]] inline Wide operator*(Wide x, Wide y) { MOE_XE_WIDE("mul", MOE_XE_X, MOE_XE_Y, "rw"(y.values)); }
[[gnu::always_inline]] inline Wide operator+(Wide x, Wide y) { MOE_XE_WIDE("add", MOE_XE_X, MOE_XE_Y, "rw"(y.values)); }
[[gnu::always_inline]] inline Wide operator*(Wide x, OfLanes y) { MOE_XE_WIDE("mul", MOE_XE_X, MOE_XE_OF_LANES, "rw"(y.twice)); }
[[gnu::always_inline]] inline Wide operator+(Wide x, OfLanes y) { MOE_XE_WIDE("add", MOE_XE_X, MOE_XE_OF_LANES, "rw"(y.twice)); }
[[gnu::always_inline]] inline Wide operator*(Wide x, float y) { MOE_XE_WIDE("mul", MOE_XE_X, MOE_XE_NUMBER, "rw.u"(y)); }
[[gnu::always_inline]] inline Wide operator*(float y, Wide x) { return x * y; }
[[gnu::always_inline]] inline Wide operator+(Wide x, float y) { MOE_XE_WIDE("add", MOE_XE_X, MOE_XE_NUMBER, "rw.u"(y)); }
[[gnu::always_inline]] inline Wide operator+(float y, Wide x) { return x + y; }
[[gnu::always_inline]] inline Wide operator-(Wide x, float y) { return x + -y; }
[[gnu::always_inline]] inline Wide operator-(float y, Wide x) { MOE_XE_WIDE("add", MOE_XE_MINUS_X, MOE_XE_NUMBER, "rw.u"(y)); }
[[gnu::always_inline]] inline Wide magnitude(Wide x) { MOE_XE_WIDE("mov", MOE_XE_ABS_X, MOE_XE_NOTHING); }
// NaN stays NaN.
[[gnu::always_inline]] inline Wide at_most(Wide x, float y) {
  MOE_XE_SELECT("cmp.gt", MOE_XE_X, MOE_XE_NUMBER, MOE_XE_NUMBER, MOE_XE_X, "rw.u"(y));
}
[[gnu::always_inline]] inline Wide at_least(Wide x, float y) {
  MOE_XE_SELECT("cmp.lt", MOE_XE_X, MOE_XE_NUMBER, MOE_XE_NUMBER, MOE_XE_X, "rw.u"(y));
}
// x, or -x where y is negative.
[[gnu::always_inline]] inline Wide with_sign(Wide x, Wide y) {
#define MOE_XE_ZERO(row) " 0x0:f"
  MOE_XE_SELECT("cmp.lt", MOE_XE_Y, MOE_XE_ZERO, MOE_XE_MINUS_X, MOE_XE_X, "rw"(y.values));
#undef MOE_XE_ZERO
}

struct WideMath {
  [[gnu::always_inline]] static Wide exp(Wide x, float factor) { return exp2(x * (factor * 1.44269504f)); }
  [[gnu::always_inline]] static Wide reciprocal(Wide x) { MOE_XE_WIDE("inv", MOE_XE_X, MOE_XE_NOTHING); }

 private:
  [[gnu::always_inline]] static Wide exp2(Wide x) { MOE_XE_WIDE("exp", MOE_XE_X, MOE_XE_NOTHING); }
};

#undef MOE_XE_SELECT
#undef MOE_XE_SELECT_LINE
#undef MOE_XE_WIDE
#undef MOE_XE_LINE
#undef MOE_XE_NOTHING
#undef MOE_XE_OF_LANES
#undef MOE_XE_NUMBER
#undef MOE_XE_Y
#undef MOE_XE_ABS_X
#undef MOE_XE_MINUS_X
#undef MOE_XE_X

}  // namespace moe_xe
