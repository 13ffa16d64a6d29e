// Of each used row: hs = scale * act(z), dz = scale * g * act'(z), dscale = <g, act(z)>; any of them may be left out.
#include <moe_xe/types.hpp>
#include <moe_xe/activate.hpp>

extern "C" MOE_XE_KERNEL_ATTRIBUTES void activate(
    const void* z, long z_stride, const void* g, long g_stride, const float* row_scales, const int* row_pairs, void* dz,
    long dz_stride, void* hs, long hs_stride, float* dscale, long rows) {
  using namespace moe_xe;
  const ActivateArguments args{static_cast<const Element<problem::z>*>(z), z_stride,
                               static_cast<const Element<problem::g>*>(g), g_stride, row_scales, row_pairs,
                               static_cast<Element<problem::dz>*>(dz), dz_stride,
                               static_cast<Element<problem::hs>*>(hs), hs_stride, dscale};
  const Team team;
  for_rows(team, rows, [&](int64 row) { activate_row(args, team, row); });
}
