// Which vector instructions the processor and the operating system offer.
#pragma once

namespace moe_xe {

// "amx" (bf16 tiles, and avx512_bf16), "avx512_bf16", "avx512" (F, BW, DQ, VL), "avx2" (with FMA and F16C) or "baseline".
// The first call asks the operating system for the tiles, on behalf of the whole process.
//
// A CPU kernel with inline assembly must ask here first: the device compiler
// accepts vdpbf16ps on every processor and the result is then garbage.
const char* cpu_isa();

}  // namespace moe_xe
