// block2d.cpp - two-dimensional block loads, stores and prefetches.
#include "bits.h"
#include "exec.h"

namespace xe {
// load_block2d, store_block2d; a load to null is a prefetch
void Sim::block2d(Thread &t, const Inst &I) {
  const uint8_t *h = t.r + I.src[0].base;
  const int op = I.desc & 63;
  const bool vnni = I.desc >> 7 & 1, tr = I.desc >> 15 & 1;
  const int es = (int[]){1, 2, 4, 8, 0, 0, 0, 0}[I.desc >> 9 & 7];
  if (!es) throw Error("block2d data size");
  if (I.sfid != SF_UGM || (I.desc >> 29 & 3)) throw Error("block2d addressing");
  const uint64_t base = rd<uint64_t>(h);
  const int64_t sw = (int64_t)rd<uint32_t>(h + 8) + 1, sh = (int64_t)rd<uint32_t>(h + 12) + 1, pitch = (int64_t)rd<uint32_t>(h + 16) + 1;
  // immediate offsets in elements: X in bits 21:12 of the extended descriptor, Y in 31:22
  const int64_t X = rd<int32_t>(h + 20) + ((int32_t)(I.exdesc << 10) >> 22), Y = rd<int32_t>(h + 24) + ((int32_t)I.exdesc >> 22);
  if (I.exdesc & 0xFFF) throw Error("block2d extended descriptor");
  const uint32_t wh = rd<uint32_t>(h + 28);
  const int w = (int)(wh & 255) + 1, hh = (int)(wh >> 8 & 255) + 1, cnt = (int)(wh >> 16 & 15) + 1;
  const bool store = op == ST2D, prefetch = !store && I.dst.kind != Opnd::Reg;
  InstStat &is = stat[t.pc];
  is.bytes += (uint64_t)w * hh * cnt * es;
  // restrictions of the message (PRM); a violation is undefined behaviour on hardware
  if (base & 63) warn("block2d: surface base not 64-byte aligned");
  if (sw < 64) warn("block2d: surface width below 64 bytes");
  if (sw & 3) warn("block2d: surface width not a multiple of 4 bytes");
  if (pitch < 64 || pitch & 15) warn("block2d: pitch below 64 bytes or not a multiple of 16");
  if (pitch < sw) warn("block2d: pitch below the width");
  if (sw > (1 << 24) || sh > (1 << 24) || pitch > (1 << 24)) warn("block2d: surface larger than 2^24");
  if ((X * es) & 3) warn("block2d: X offset not a multiple of 4 bytes");
  if (w * es < 4 || w * es * cnt > 64 ) { if (!(tr)) warn("block2d: block row below 4 or above 64 bytes"); }
  if (hh > 32 || (store && hh > 8)) warn("block2d: block height");
  auto elem = [&](int64_t x, int64_t y) -> uint64_t { return base + (uint64_t)(y * pitch + x * es); };
  const int64_t we = sw / es;
  if (store) {
    if (vnni || tr || cnt != 1) throw Error("form of store_block2d");
    int wp = (int)std::bit_ceil((unsigned)w);
    const uint8_t *p = t.r + I.src[1].base;
    if (I.src[1].base + wp * hh * es > (uint32_t)NGRF * GRF) throw Error("payload outside the register file");
    if (wp * hh * es > I.src1len * GRF) throw Error("store_block2d: payload shorter than the block");
    for (int y = 0; y < hh; ++y) {
      if (Y + y < 0 || Y + y >= sh) continue;
      int64_t x0 = std::max<int64_t>(0, -X), x1 = std::min<int64_t>(w, we - X);
      if (x1 <= x0) continue;
      memcpy(mem.at(elem(X + x0, Y + y), (x1 - x0) * es, true), p + (y * wp + x0) * es, (x1 - x0) * es);
    }
    return;
  }
  if (prefetch) return;
  uint8_t *dst = t.r + I.dst.base;
  const int wp = (int)std::bit_ceil((unsigned)w), hp = (int)std::bit_ceil((unsigned)hh);
  if (tr && (es < 4 || vnni)) throw Error("form of transposed load_block2d");
  if (vnni && es > 2) throw Error("form of transformed load_block2d");
  const int per = vnni ? 4 / es : 1, rows = vnni ? (hh + per - 1) / per * per : hh;
  int blockBytes = tr ? w * hp * es : wp * rows * es;
  blockBytes = (blockBytes + GRF - 1) / GRF * GRF;
  if (I.dst.base + blockBytes * cnt > (uint32_t)NGRF * GRF) throw Error("load_block2d: result outside the register file");
  int rlen = I.desc >> 20 & 31;                    // 31 stands for 31 or 32
  if (blockBytes * cnt > GRF * (rlen == 31 ? 32 : rlen)) throw Error("load_block2d: block larger than the response length");
  for (int c = 0; c < cnt; ++c) {
    uint8_t *o = dst + c * blockBytes;
    const int64_t xc = X + (int64_t)c * w;
    if (vnni && es == 2 && w == 16 && hh % 2 == 0 && xc >= 0 && xc + w <= we && Y >= 0 && Y + hh <= sh) {   // common case
      for (int y = 0; y < hh; y += 2) {
        const uint8_t *p = mem.at(elem(xc, Y + y), 32, false), *q = mem.at(elem(xc, Y + y + 1), 32, false);
        uint16_t a[16], b[16];
        uint32_t v[16];
        memcpy(a, p, 32); memcpy(b, q, 32);
        for (int x = 0; x < 16; ++x) v[x] = a[x] | (uint32_t)b[x] << 16;
        memcpy(o + y * 32, v, 64);
      }
      continue;
    }
    memset(o, 0, blockBytes);
    for (int y = 0; y < hh; ++y) {
      if (Y + y < 0 || Y + y >= sh) continue;
      int64_t xb = X + (int64_t)c * w;
      int64_t x0 = std::max<int64_t>(0, -xb), x1 = std::min<int64_t>(w, we - xb);
      if (x1 <= x0) continue;
      const uint8_t *p = mem.at(elem(xb + x0, Y + y), (x1 - x0) * es, false);
      if (!tr && !vnni) { memcpy(o + (y * wp + x0) * es, p, (x1 - x0) * es); continue; }
      for (int64_t x = x0; x < x1; ++x) {
        int64_t q = tr ? x * hp + y : ((y / per) * wp + x) * per + y % per;
        memcpy(o + q * es, p + (x - x0) * es, es);
      }
    }
  }
}
}  // namespace xe
