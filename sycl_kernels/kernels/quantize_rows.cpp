// Each row's int8 codes and its scale.
#include <moe_xe/types.hpp>
#include <moe_xe/quantize_rows.hpp>

extern "C" MOE_XE_KERNEL_ATTRIBUTES void quantize_rows(const void* x, long x_stride, void* codes, long codes_stride, float* scales, long rows) {
  using namespace moe_xe;
  const QuantizeRowsArguments args{static_cast<const Element<problem::input>*>(x), x_stride, static_cast<signed char*>(codes),
                                   codes_stride, scales};
  const Team team;
  for_rows(team, rows, [&](int64 row) { quantize_row(args, team, row); });
}
