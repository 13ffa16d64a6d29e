// alu_int.cpp - integer and logic instructions, computed in 64 bits.
#include "operands.h"

namespace xe {
namespace {
int64_t truncTo(Ty t, int64_t v) {
  switch (t) {
    case UB: return (uint8_t)v; case B: return (int8_t)v; case UW: return (uint16_t)v; case W: return (int16_t)v;
    case UD: return (uint32_t)v; case D: return (int32_t)v; default: return v;
  }
}
int srcBits(const Inst &I) {
  int b = tySize(I.dst.ty);
  if (tySize(I.src[0].ty) > b) b = tySize(I.src[0].ty);
  return b * 8;
}
}  // namespace

void Sim::aluInt(Thread &t, const Inst &I, uint32_t m, uint32_t pr) {
  int n = I.n;
  int64_t a[32], b[32], c[32], r[32];
  bool logic = I.op == OP_AND || I.op == OP_OR || I.op == OP_XOR || I.op == OP_NOT || I.op == OP_BFN;
  int64_t *s[3] = {a, b, c};
  for (int k = 0; k < 3; ++k) if (I.src[k].kind != Opnd::None) loadI(t, I.src[k], n, s[k], logic);
  bool trunc = logic;
  int bits = srcBits(I);
  uint32_t shm = bits == 64 ? 63 : 31;
  auto unsign = [&](int64_t v) -> uint64_t {    // value of src0 as an unsigned of its own width
    switch (tySize(I.src[0].ty)) { case 1: return (uint8_t)v; case 2: return (uint16_t)v; case 4: return (uint32_t)v; default: return (uint64_t)v; }
  };
  const int accI = 0;   // the implicit accumulator is acc0, for M16 too (IGC writes acc0 before both halves)
  switch (I.op) {
    case OP_MOV: for (int i = 0; i < n; ++i) r[i] = a[i];
      if (I.src[0].ty == UQ && isFloat(I.dst.ty)) {   // unsigned conversion
        double d[32]; loadR(t, I.src[0], n, d); storeR(t, I, m, d); return;
      }
      break;
    case OP_ADD: for (int i = 0; i < n; ++i) r[i] = (int64_t)((uint64_t)a[i] + (uint64_t)b[i]); break;
    case OP_AVG: for (int i = 0; i < n; ++i) r[i] = (a[i] + b[i] + 1) >> 1; break;
    case OP_ADD3: for (int i = 0; i < n; ++i) r[i] = (int64_t)((uint64_t)a[i] + (uint64_t)b[i] + (uint64_t)c[i]); break;
    case OP_MUL: for (int i = 0; i < n; ++i) r[i] = (int64_t)((uint64_t)a[i] * (uint64_t)b[i]); break;
    case OP_MAD: for (int i = 0; i < n; ++i) r[i] = (int64_t)((uint64_t)a[i] + (uint64_t)b[i] * (uint64_t)c[i]); break;
    case OP_MAC: for (int i = 0; i < n; ++i) r[i] = (int64_t)((uint64_t)t.acc64[accI + i] + (uint64_t)a[i] * (uint64_t)b[i]); break;
    case OP_MACH: case OP_MACL:
      // the accumulator holds src0 * low16(src1); add src0 * high16(src1) << 16
      for (int i = 0; i < n; ++i) {
        int64_t hi16 = isSigned(I.src[1].ty) ? (int64_t)(int32_t)b[i] >> 16 : (int64_t)((uint32_t)b[i] >> 16);
        uint64_t full = (uint64_t)t.acc64[accI + i] + (((uint64_t)a[i] * (uint64_t)hi16) << 16);
        if (I.op == OP_MACH) r[i] = isSigned(I.dst.ty) ? (int64_t)full >> 32 : (int64_t)(full >> 32);
        else r[i] = isSigned(I.dst.ty) ? (int64_t)(int32_t)full : (int64_t)(uint32_t)full;
      }
      break;
    case OP_ADDC: case OP_SUBB:
      for (int i = 0; i < n; ++i) {
        uint64_t x = (uint32_t)a[i], y = (uint32_t)b[i], z = I.op == OP_ADDC ? x + y : x - y;
        r[i] = (uint32_t)z;
        if (m >> i & 1) { uint32_t cy = I.op == OP_ADDC ? (uint32_t)(z >> 32) : (uint32_t)(x < y); wr<uint32_t>(t.r + ARF_ACC + (accI + i) * 4, cy); t.acc64[accI + i] = cy; }
      }
      break;
    case OP_CMP: case OP_CMPN: {
      uint32_t res = 0;
      if (I.src[0].ty == UQ || I.src[1].ty == UQ) {
        auto w = [](const Opnd &o, int64_t v) { return o.ty == UQ && !o.neg ? (__int128)(uint64_t)v : (__int128)v; };
        for (int i = 0; i < n; ++i) res |= (uint32_t)cond<__int128>(I.cmod, w(I.src[0], a[i]), w(I.src[1], b[i])) << i;
      } else res = condMask(I.cmod, n, a, b);
      setFlags(t, I, m, res);
      for (int i = 0; i < n; ++i) r[i] = res >> i & 1 ? -1 : 0;
      if (isFloat(I.dst.ty)) throw Error("cmp with a float destination");
      storeI(t, I, m, r);
      return;
    }
    case OP_SEL:
      if (I.cmod != CM_NONE) {
        if (I.src[0].ty == UQ && I.src[1].ty == UQ) { for (int i = 0; i < n; ++i) r[i] = cond<uint64_t>(I.cmod, a[i], b[i]) ? a[i] : b[i]; }
        else for (int i = 0; i < n; ++i) r[i] = cond(I.cmod, a[i], b[i]) ? a[i] : b[i];
      } else for (int i = 0; i < n; ++i) r[i] = pr >> i & 1 ? a[i] : b[i];
      storeI(t, I, m, r);
      return;
    case OP_CSEL: for (int i = 0; i < n; ++i) r[i] = cond<int64_t>(I.cmod, c[i], 0) ? a[i] : b[i]; storeI(t, I, m, r); return;
    case OP_AND: for (int i = 0; i < n; ++i) r[i] = a[i] & b[i]; break;
    case OP_OR: for (int i = 0; i < n; ++i) r[i] = a[i] | b[i]; break;
    case OP_XOR: for (int i = 0; i < n; ++i) r[i] = a[i] ^ b[i]; break;
    case OP_NOT: for (int i = 0; i < n; ++i) r[i] = ~a[i]; break;
    case OP_BFN:
      for (int i = 0; i < n; ++i) {
        uint64_t v = 0, x = a[i], y = b[i], z = c[i];
        for (int k = 0; k < 8; ++k) if (I.bfn >> k & 1) v |= (k & 1 ? x : ~x) & (k & 2 ? y : ~y) & (k & 4 ? z : ~z);
        r[i] = (int64_t)v;
      }
      break;
    case OP_SHL: for (int i = 0; i < n; ++i) r[i] = (int64_t)((uint64_t)a[i] << (b[i] & shm)); trunc = true; break;
    case OP_SHR: for (int i = 0; i < n; ++i) r[i] = (int64_t)(unsign(a[i]) >> (b[i] & shm)); trunc = true; break;
    case OP_ASR: for (int i = 0; i < n; ++i) r[i] = I.src[0].ty == UQ && !I.src[0].neg ? (int64_t)((uint64_t)a[i] >> (b[i] & shm)) : a[i] >> (b[i] & shm); trunc = true; break;
    case OP_ROL: case OP_ROR:
      for (int i = 0; i < n; ++i) {
        int k = (int)(b[i] & (bits - 1));
        if (I.op == OP_ROR) k = (bits - k) & (bits - 1);
        uint64_t v = unsign(a[i]);
        r[i] = (int64_t)(k ? (v << k) | (v >> (bits - k)) : v);
      }
      trunc = true; break;
    case OP_BFE: for (int i = 0; i < n; ++i) {
        int w = a[i] & 31, off = b[i] & 31;
        if (isSigned(I.src[2].ty)) r[i] = w ? (int64_t)(int32_t)((uint32_t)c[i] << (32 - w - off < 0 ? 0 : 32 - w - off)) >> (32 - w) : 0;
        else r[i] = w ? ((uint32_t)c[i] >> off) & ((1u << w) - 1) : 0;
      }
      break;
    case OP_BFI1: for (int i = 0; i < n; ++i) { int w = a[i] & 31, off = b[i] & 31; r[i] = (int64_t)((uint32_t)(((1u << w) - 1) << off)); } break;
    case OP_BFI2: for (int i = 0; i < n; ++i) r[i] = (a[i] & b[i]) | (~a[i] & c[i]); break;
    case OP_BFREV: for (int i = 0; i < n; ++i) { uint32_t v = (uint32_t)a[i], q = 0; for (int k = 0; k < 32; ++k) q |= (v >> k & 1) << (31 - k); r[i] = q; } break;
    case OP_CBIT: for (int i = 0; i < n; ++i) r[i] = std::popcount(unsign(a[i])); break;
    case OP_LZD: for (int i = 0; i < n; ++i) r[i] = std::countl_zero((uint32_t)a[i]); break;
    case OP_FBL: for (int i = 0; i < n; ++i) r[i] = (uint32_t)a[i] ? std::countr_zero((uint32_t)a[i]) : -1; break;
    case OP_FBH: for (int i = 0; i < n; ++i) {
        uint32_t v = (uint32_t)a[i];
        if (isSigned(I.src[0].ty)) { if ((int32_t)v < 0) v = ~v; }
        r[i] = v ? std::countl_zero(v) : -1;
      }
      break;
    case OP_DP4A: for (int i = 0; i < n; ++i) {
        int64_t acc = a[i];
        for (int k = 0; k < 4; ++k) {
          int64_t x = I.src[1].ty == D ? (int64_t)(int8_t)(b[i] >> (8 * k)) : (int64_t)(uint8_t)(b[i] >> (8 * k));
          int64_t y = I.src[2].ty == D ? (int64_t)(int8_t)(c[i] >> (8 * k)) : (int64_t)(uint8_t)(c[i] >> (8 * k));
          acc += x * y;
        }
        r[i] = acc;
      }
      break;
    case OP_MATH:
      for (int i = 0; i < n; ++i) {
        if (I.fn != MF_IQOT && I.fn != MF_IREM) throw Error("integer math function");
        if (b[i] == 0) { r[i] = I.fn == MF_IQOT ? -1 : a[i]; continue; }
        r[i] = I.fn == MF_IQOT ? a[i] / b[i] : a[i] % b[i];
      }
      break;
    default: throw Error("integer form is not supported");
  }
  if (I.cmod != CM_NONE) {
    uint32_t res = 0;
    if (I.cmod == CM_OV) { for (int i = 0; i < n; ++i) res |= (uint32_t)(truncTo(I.dst.ty, r[i]) != r[i]) << i; if (bits == 64) throw Error("64-bit overflow flag"); }
    else for (int i = 0; i < n; ++i) res |= (uint32_t)cond<int64_t>(I.cmod, trunc ? truncTo(I.dst.ty, r[i]) : r[i], 0) << i;
    setFlags(t, I, m, res);
  }
  storeI(t, I, m, r);
}
}  // namespace xe
