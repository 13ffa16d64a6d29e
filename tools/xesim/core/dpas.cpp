// dpas.cpp - the systolic matrix instruction.
// dst/src0: rcount rows of 16 lanes; src1 (B): 8 deep, one dword of packed k per lane; src2 (A): rcount
// rows of 8 dwords. The float sum runs in order of k with one fused step per product; the order and
// the inner precision of real hardware are not documented.
#include "bits.h"
#include "exec.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xe {
namespace {
constexpr int N = 16;   // lanes

// 16 lanes, c += x * b with one rounding
#if defined(__AVX512F__)
struct Vec { __m512 v; };
inline Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline void store(float *p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void fma(Vec &c, float x, const Vec &b) { c.v = _mm512_fmadd_ps(_mm512_set1_ps(x), b.v, c.v); }
#elif defined(__FMA__) && defined(__AVX2__)
struct Vec { __m256 lo, hi; };
inline Vec load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float *p, Vec a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
inline void fma(Vec &c, float x, const Vec &b) {
  __m256 y = _mm256_set1_ps(x);
  c.lo = _mm256_fmadd_ps(y, b.lo, c.lo);
  c.hi = _mm256_fmadd_ps(y, b.hi, c.hi);
}
#else
struct Vec { float v[N]; };
inline Vec load(const float *p) { Vec a; memcpy(a.v, p, sizeof a.v); return a; }
inline void store(float *p, const Vec &a) { memcpy(p, a.v, sizeof a.v); }
inline void fma(Vec &c, float x, const Vec &b) { for (int l = 0; l < N; ++l) c.v[l] = __builtin_fmaf(x, b.v[l], c.v[l]); }
#endif

// the rows are independent chains: R of them in flight
template <int K, int R> void fmaRows(float (*acc)[N], const float (*a)[16], const float (*b)[N]) {
  Vec c[R];
  for (int r = 0; r < R; ++r) c[r] = load(acc[r]);
  for (int k = 0; k < K; ++k) {
    const Vec y = load(b[k]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) fma(c[r], a[r][k], y);
  }
  for (int r = 0; r < R; ++r) store(acc[r], c[r]);
}

template <int PER, class Cv> __attribute__((optimize("O3")))
void mac(float (*acc)[N], const uint8_t *pa, const uint8_t *pb, int rows, Cv cv) {
  constexpr int K = 8 * PER, ES = 4 / PER;
  alignas(64) float b[K][N], a[8][16];
  for (int d = 0; d < 8; ++d)
    for (int q = 0; q < PER; ++q)
      for (int l = 0; l < N; ++l) b[d * PER + q][l] = cv(pb + d * 64 + l * 4 + q * ES);
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < K; ++k) a[r][k] = cv(pa + r * 32 + k * ES);
  int r = 0;
  if (rows == 8) { fmaRows<K, 8>(acc, a, b); r = 8; }
  for (; r < rows; ++r) fmaRows<K, 1>(acc + r, a + r, b);
}

template <class TA, class TB> __attribute__((optimize("O3")))
void imac(int32_t (*acc)[N], const uint8_t *pa, const uint8_t *pb, int rows) {
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < 32; ++k) {
      const int a = (TA)pa[r * 32 + k];
      for (int l = 0; l < N; ++l) acc[r][l] += a * (int)(TB)pb[(k / 4) * 64 + l * 4 + k % 4];
    }
}
}  // namespace

void Sim::dpas(Thread &t, const Inst &I) {
  const Opnd &D0 = I.dst, &C = I.src[0], &B0 = I.src[1], &A = I.src[2];
  if (I.n != N || I.sdepth != 8 || I.rcount < 1 || I.rcount > 8) throw Error("dpas shape");
  const int R = I.rcount;
  const uint8_t *pb = t.r + B0.base, *pa = t.r + A.base;
  auto check = [&](const Opnd &o, int bytes) { if (o.kind == Opnd::Reg && o.base + bytes > (uint32_t)NGRF * GRF) throw Error("dpas operand outside the register file"); };
  check(B0, 512); check(A, 32 * R); check(D0, R * N * tySize(D0.ty)); check(C, R * N * tySize(C.ty));
  if (isFloat(B0.ty) || B0.ty == TF32) {
    if (A.ty != B0.ty) throw Error("dpas with mixed float types");
    alignas(64) float acc[8][N];
    if (C.kind == Opnd::Null) memset(acc, 0, sizeof acc);
    else if (C.ty == F) memcpy(acc, t.r + C.base, R * 64);
    else if (C.ty == BF || C.ty == HF)
      for (int i = 0; i < R * N; ++i) { uint16_t h = rd<uint16_t>(t.r + C.base + 2 * i); acc[0][i] = C.ty == BF ? bf2f(h) : hf2f(h); }
    else throw Error("dpas accumulator type");
    switch (B0.ty) {
      case BF: mac<2>(acc, pa, pb, R, [](const uint8_t *p) { return bf2f(rd<uint16_t>(p)); }); break;
      case HF: mac<2>(acc, pa, pb, R, [](const uint8_t *p) { return hf2f(rd<uint16_t>(p)); }); break;
      case TF32: mac<1>(acc, pa, pb, R, [](const uint8_t *p) { return std::bit_cast<float>(rd<uint32_t>(p) & 0xFFFFE000u); }); break;
      default: throw Error("dpas source type");
    }
    if (D0.ty == F) memcpy(t.r + D0.base, acc, R * 64);
    else if (D0.ty == BF) for (int i = 0; i < R * N; ++i) wr<uint16_t>(t.r + D0.base + 2 * i, f2bf(acc[0][i]));
    else if (D0.ty == HF) for (int i = 0; i < R * N; ++i) wr<uint16_t>(t.r + D0.base + 2 * i, std::bit_cast<uint16_t>((_Float16)acc[0][i]));
    else throw Error("dpas destination type");
    return;
  }
  if ((B0.ty != UB && B0.ty != B) || (A.ty != UB && A.ty != B)) throw Error("dpas source type");
  if (tySize(D0.ty) != 4 || isFloat(D0.ty) || (C.kind != Opnd::Null && (tySize(C.ty) != 4 || isFloat(C.ty)))) throw Error("dpas accumulator type");
  if (I.sat) throw Error("dpas with saturation");
  alignas(64) int32_t acc[8][N] = {};
  if (C.kind != Opnd::Null) memcpy(acc, t.r + C.base, R * 64);
  if (A.ty == B) { if (B0.ty == B) imac<int8_t, int8_t>(acc, pa, pb, R); else imac<int8_t, uint8_t>(acc, pa, pb, R); }
  else { if (B0.ty == B) imac<uint8_t, int8_t>(acc, pa, pb, R); else imac<uint8_t, uint8_t>(acc, pa, pb, R); }
  memcpy(t.r + D0.base, acc, R * 64);
}
}  // namespace xe
