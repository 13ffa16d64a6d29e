// alu_float.cpp - floating-point instructions, math functions, the division and square root macros.
#include "operands.h"

namespace xe {
namespace {
bool hasType(const Inst &I, Ty t) {
  if (I.dst.ty == t && I.dst.kind != Opnd::None) return true;
  for (auto &s : I.src) if (s.kind != Opnd::None && s.ty == t) return true;
  return false;
}
}  // namespace

template <class R> void Sim::aluReal(Thread &t, const Inst &I, uint32_t m, uint32_t pr) {
  int n = I.n;
  R a[32], b[32], c[32], r[32];
  R *s[3] = {a, b, c};
  for (int k = 0; k < 3; ++k) if (I.src[k].kind != Opnd::None && I.src[k].kind != Opnd::Null) loadR(t, I.src[k], n, s[k]);
  switch (I.op) {
    case OP_MOV:
      // a mov between equal float types keeps the bits (NaN payloads, no conversion)
      if (I.src[0].ty == I.dst.ty && !I.src[0].neg && !I.src[0].abs && !I.sat && I.cmod == CM_NONE && I.src[0].kind != Opnd::Imm) {
        int64_t q[32];
        Opnd o = I.src[0];
        loadI(t, o, n, q, false);
        switch (tySize(I.dst.ty)) {
          case 2: scatter<uint16_t>(t, I.dst, n, m, q, [](int64_t x) { return (uint16_t)x; }); break;
          case 4: scatter<uint32_t>(t, I.dst, n, m, q, [](int64_t x) { return (uint32_t)x; }); break;
          default: scatter<uint64_t>(t, I.dst, n, m, q, [](int64_t x) { return (uint64_t)x; });
        }
        return;
      }
      if (I.src[0].kind == Opnd::Imm && I.src[0].ty == I.dst.ty) {
        uint64_t q[32];
        for (int i = 0; i < n; ++i) q[i] = I.src[0].imm;
        switch (tySize(I.dst.ty)) {
          case 2: scatter<uint16_t>(t, I.dst, n, m, q, [](uint64_t x) { return (uint16_t)x; }); break;
          case 4: scatter<uint32_t>(t, I.dst, n, m, q, [](uint64_t x) { return (uint32_t)x; }); break;
          default: scatter<uint64_t>(t, I.dst, n, m, q, [](uint64_t x) { return x; });
        }
        return;
      }
      for (int i = 0; i < n; ++i) r[i] = a[i];
      break;
    case OP_ADD: for (int i = 0; i < n; ++i) r[i] = a[i] + b[i]; break;
    case OP_MUL: for (int i = 0; i < n; ++i) r[i] = a[i] * b[i]; break;
    case OP_MAD: for (int i = 0; i < n; ++i) r[i] = std::fma(b[i], c[i], a[i]); break;
    case OP_MAC: { R acc[32]; Opnd o = I.dst; o.base = ARF_ACC; o.kind = Opnd::Reg; loadR(t, o, n, acc); for (int i = 0; i < n; ++i) r[i] = std::fma(a[i], b[i], acc[i]); break; }
    case OP_CMP: case OP_CMPN: {
      uint32_t res = condMask(I.cmod, n, a, b);
      setFlags(t, I, m, res);
      if (I.dst.kind != Opnd::Null) {
        int64_t q[32];
        for (int i = 0; i < n; ++i) q[i] = res >> i & 1 ? -1 : 0;
        Inst J = I;   // rare: only when cmp has a destination
        J.dst.ty = tySize(I.dst.ty) == 2 ? UW : tySize(I.dst.ty) == 4 ? UD : UQ;
        storeI(t, J, m, q);
      }
      return;
    }
    case OP_SEL:
      if (I.cmod != CM_NONE) {   // min/max: a NaN loses
        for (int i = 0; i < n; ++i)
          r[i] = I.cmod == CM_LT || I.cmod == CM_GE ? (a[i] != a[i] ? b[i] : b[i] != b[i] ? a[i] : cond(I.cmod, a[i], b[i]) ? a[i] : b[i])
                                                    : cond(I.cmod, a[i], b[i]) ? a[i] : b[i];
      } else for (int i = 0; i < n; ++i) r[i] = pr >> i & 1 ? a[i] : b[i];
      storeR(t, I, m, r);
      return;
    case OP_CSEL: for (int i = 0; i < n; ++i) r[i] = cond<R>(I.cmod, c[i], 0) ? a[i] : b[i]; storeR(t, I, m, r); return;
    case OP_RNDE: for (int i = 0; i < n; ++i) r[i] = std::nearbyint(a[i]); break;
    case OP_RNDD: for (int i = 0; i < n; ++i) r[i] = std::floor(a[i]); break;
    case OP_RNDU: for (int i = 0; i < n; ++i) r[i] = std::ceil(a[i]); break;
    case OP_RNDZ: for (int i = 0; i < n; ++i) r[i] = std::trunc(a[i]); break;
    case OP_FRC: for (int i = 0; i < n; ++i) r[i] = a[i] - std::floor(a[i]); break;
    case OP_MATH:
      for (int i = 0; i < n; ++i) {
        R x = a[i];
        switch (I.fn) {
          case MF_INV: r[i] = 1 / x; break;
          case MF_LOG: r[i] = std::log2(x); break;
          case MF_EXP: r[i] = std::exp2(x); break;
          case MF_SQT: r[i] = std::sqrt(x); break;
          case MF_RSQT: r[i] = 1 / std::sqrt(x); break;
          case MF_SIN: r[i] = std::sin(x); break;
          case MF_COS: r[i] = std::cos(x); break;
          case MF_POW: r[i] = std::pow(std::fabs(x), b[i]); break;
          case MF_FDIV: r[i] = x / b[i]; break;
          case MF_TANH: r[i] = std::tanh(x); break;
          case MF_SIGM: r[i] = 1 / (1 + std::exp(-x)); break;
          default: throw Error("math function");
        }
      }
      break;
    default: throw Error("float form is not supported");
  }
  if (I.cmod != CM_NONE) {
    R z[32] = {};
    setFlags(t, I, m, condMask(I.cmod, n, r, z));
  }
  storeR(t, I, m, r);
}

void Sim::aluFloat(Thread &t, const Inst &I, uint32_t m, uint32_t pr) {
  bool dbl = hasType(I, DF);
  for (auto &s : I.src) if (s.kind != Opnd::None && (s.ty == Q || s.ty == UQ)) dbl = true;
  if (I.dst.ty == HF && I.op == OP_MAD) dbl = true;   // one rounding only
  if (dbl && I.dst.ty == F && I.op != OP_MOV && !hasType(I, HF)) dbl = hasType(I, DF);
  if (dbl) aluReal<double>(t, I, m, pr); else aluReal<float>(t, I, m, pr);
}

// math.invm / math.rsqtm / madm: the IEEE division and square root macros. The
// hidden extra mantissa bits of the mme registers are kept in quad precision.
void Sim::mathm(Thread &t, const Inst &I, uint32_t m) {
  int n = I.n;
  bool df = I.dst.ty == DF;
  __float128 s[3][32], r[32];
  for (int k = 0; k < 3; ++k) {
    const Opnd &o = I.src[k];
    if (o.kind == Opnd::None) continue;
    Opnd p = o;
    p.neg = p.abs = false;
    if (p.kind == Opnd::Reg && p.V == 1 && p.W == 1 && p.H == 0 && n > 1) { p.V = p.W = p.H = 1; finishOpnd(p, n, false); }
    double v[32];
    loadR(t, p, n, v);
    for (int i = 0; i < n; ++i) {
      s[k][i] = v[i];
      if (o.mme >= 0 && o.mme < 8) s[k][i] += t.mme[o.mme][i];
      if (o.abs && s[k][i] < 0) s[k][i] = -s[k][i];
      if (o.neg) s[k][i] = -s[k][i];
    }
  }
  uint32_t early = 0;
  for (int i = 0; i < n; ++i) {
    if (I.op == OP_MADM) { r[i] = s[0][i] + s[1][i] * s[2][i]; continue; }
    double x = (double)s[0][i], y = I.fn == MF_INVM ? (double)s[1][i] : 0;
    bool special;
    if (I.fn == MF_INVM) {
      // out of the range of the macro: hardware finishes the division itself and says so ("early out")
      int ex = std::ilogb(x), ey = std::ilogb(y), lim = df ? 1000 : 120;
      special = !std::isfinite(x) || !std::isfinite(y) || x == 0 || y == 0 || std::abs(ex) > lim || std::abs(ey) > lim || std::abs(ex - ey) > lim;
      // the hardware's starting value has about 23 good bits
      r[i] = special ? (__float128)(df ? x / y : (double)((float)x / (float)y)) : (__float128)(float)(1.0 / y) ;
      if (!special && df && (std::fabs(y) > 1e30 || std::fabs(y) < 1e-30)) r[i] = 1.0 / y;
    } else {
      special = !(x > 0) || !std::isfinite(x) || std::abs(std::ilogb(x)) > (df ? 1000 : 120);
      r[i] = special ? (__float128)(df ? std::sqrt(x) : (double)std::sqrt((float)x)) : (__float128)(1.0 / std::sqrt(x));
    }
    early |= (uint32_t)special << i;
  }
  if (I.cmod == CM_EO) setFlags(t, I, m, early);
  double out[32];
  for (int i = 0; i < n; ++i) {
    out[i] = df ? (double)r[i] : (double)(float)r[i];
    if (I.dst.mme >= 0 && I.dst.mme < 8 && (m >> i & 1)) t.mme[I.dst.mme][i] = std::isfinite(out[i]) ? r[i] - (__float128)out[i] : 0;
  }
  storeR(t, I, m, out);
}
}  // namespace xe
