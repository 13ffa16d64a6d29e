// memory.cpp - mapped memory, and the messages behind a send: barriers, LSC loads, stores and atomics.
#include "bits.h"
#include "exec.h"
#include <algorithm>
#include <cmath>

namespace xe {
namespace {
constexpr int kVec[8] = {1, 2, 3, 4, 8, 16, 32, 64};

// atomic operation on one element; returns the old value
template <class T> T atomicInt(int op, T o, T x, T y, T &nw) {
  using S = std::make_signed_t<T>;
  switch (op) {
    case 0x08: nw = o + 1; break;
    case 0x09: nw = o - 1; break;
    case 0x0A: nw = o; break;
    case 0x0B: nw = x; break;
    case 0x0C: nw = o + x; break;
    case 0x0D: nw = o - x; break;
    case 0x0E: nw = (S)o < (S)x ? o : x; break;
    case 0x0F: nw = (S)o > (S)x ? o : x; break;
    case 0x10: nw = o < x ? o : x; break;
    case 0x11: nw = o > x ? o : x; break;
    case 0x12: nw = o == x ? y : o; break;
    case 0x18: nw = o & x; break;
    case 0x19: nw = o | x; break;
    case 0x1A: nw = o ^ x; break;
    default: throw Error("atomic operation");
  }
  return o;
}
template <class U, class Fl> U atomicFloat(int op, U o, U x, U y, U &nw) {
  Fl a = std::bit_cast<Fl>(o), b = std::bit_cast<Fl>(x), c = std::bit_cast<Fl>(y), r;
  switch (op) {
    case 0x13: r = (Fl)(a + b); break;
    case 0x14: r = (Fl)(a - b); break;
    case 0x15: r = a < b ? a : b; break;
    case 0x16: r = a > b ? a : b; break;
    case 0x17: r = a == b ? c : a; break;
    default: throw Error("float atomic operation");
  }
  nw = std::bit_cast<U>(r);
  return o;
}
}  // namespace

void Memory::map(uint64_t base, uint64_t size, void *host, bool ro, const char *name) {
  auto it = regions.upper_bound(base);
  if (it != regions.end() && it->first < base + size) throw Error(std::string("overlapping mapping: ") + name);
  if (it != regions.begin() && std::prev(it)->second.base + std::prev(it)->second.size > base) throw Error(std::string("overlapping mapping: ") + name);
  regions[base] = Region{base, size, (uint8_t *)host, ro, name};
  last = nullptr;
}
void Memory::unmap(uint64_t base) { regions.erase(base); last = nullptr; }
uint8_t *Memory::slow(uint64_t a, uint64_t n, bool write) {
  auto it = regions.upper_bound(a);
  char b[200];
  if (it != regions.begin()) {
    const Region &r = std::prev(it)->second;
    if (a - r.base + n <= r.size) {
      if (write && r.readonly) { snprintf(b, sizeof b, "write to the read-only buffer %s at %#llx", r.name.c_str(), (unsigned long long)a); throw Error(b); }
      last = &r;
      return r.host + (a - r.base);
    }
    snprintf(b, sizeof b, "%s of %llu bytes at %#llx hits no buffer (%lld bytes behind the start of %s, which has %llu)", write ? "write" : "read",
             (unsigned long long)n, (unsigned long long)a, (long long)(a - r.base), r.name.c_str(), (unsigned long long)r.size);
    throw Error(b);
  }
  snprintf(b, sizeof b, "%s of %llu bytes at %#llx hits no buffer", write ? "write" : "read", (unsigned long long)n, (unsigned long long)a);
  throw Error(b);
}

void Sim::checkBarrier(Group &g, Barrier &b) {
  uint32_t p = b.needProd, c = b.needCons;
  if (b.activeOnly) { p = std::min<uint32_t>(p, g.live); c = std::min<uint32_t>(c, g.live); }
  if (b.prod < p || b.cons < c) return;
  b.prod = b.cons = 0;
  ++b.gen;
  barrierEvent = true;
}

void Sim::send(Thread &t, const Inst &I, uint32_t m) {
  if (I.descReg) throw Error("send with a register descriptor");
  if (I.sfid == SF_GTWY) {
    if (!m) return;
    if ((I.desc & 7) != 4) throw Error("gateway message");
    uint32_t h = rd<uint32_t>(t.r + I.src[0].base + 8);
    int id = h & 255;
    if (id >= 32) throw Error("barrier id");
    Barrier &b = t.g->bar[id];
    uint32_t type = h >> 14 & 3;
    if (t.signaled[id] && b.gen == t.sigGen[id]) throw Error("second barrier signal before the wait");
    t.signaled[id] = true;
    t.sigGen[id] = b.gen;
    b.needProd = h >> 16 & 255;
    b.needCons = h >> 24;
    b.activeOnly = h >> 8 & 1;
    if (type == 0 || type == 1) ++b.prod;
    if (type == 0 || type == 2) ++b.cons;
    checkBarrier(*t.g, b);
    return;
  }
  if (I.sfid != SF_UGM && I.sfid != SF_SLM && I.sfid != SF_UGML) throw Error("shared function is not supported");
  int op = I.desc & 63;
  if (op == FENCE) return;
  if (op == LD2D || op == ST2D) { if (m) block2d(t, I); return; }
  lsc(t, I, m);
}

void Sim::lsc(Thread &t, const Inst &I, uint32_t m) {
  const uint32_t d = I.desc, ex = I.exdesc;
  const int op = d & 63, asz = d >> 7 & 3, dsz = d >> 9 & 7, surf = d >> 29 & 3;
  const bool atomic = op >= 0x08 && op <= 0x1A, quad = op == LDQ || op == STQ;
  const bool store = op == ST || op == STQ;
  if (!atomic && op != LD && op != ST && !quad) throw Error("LSC operation " + std::to_string(op));
  const bool transpose = !quad && (d >> 15 & 1);
  const int nvec = atomic ? 1 : quad ? std::popcount(d >> 12 & 15u) : kVec[d >> 12 & 7];
  static const int memSz[8] = {1, 2, 4, 8, 1, 2, 2, 0}, regSz[8] = {1, 2, 4, 8, 4, 4, 4, 0};
  const int ms = memSz[dsz], rs = regSz[dsz];
  if (!ms) throw Error("LSC data size");
  if (!transpose && rs < 4) throw Error("LSC d8/d16 without u32 in a SIMT message");
  // address space
  enum { FLAT, SLM, SCRATCH, HEAP } space;
  int64_t immOff = 0;
  if (I.sfid == SF_SLM) {
    if (surf != 0 || asz != 2) throw Error("SLM addressing");
    space = SLM; immOff = (int32_t)ex >> 12;
  } else if (surf == 0) {
    if (asz != 3) throw Error("flat access with other than A64 addresses");
    space = FLAT; immOff = (int32_t)ex >> 12;
  } else if (surf == 3) {
    if (ex >> 24 != 255 || asz != 2) throw Error("stateful access (bti)");
    space = HEAP; immOff = ((int32_t)(ex << 8)) >> 20;
  } else {
    if (asz != 2) throw Error("scratch addressing");
    space = SCRATCH; immOff = (int32_t)ex >> 15;
  }
  auto at = [&](uint64_t a, int n, bool w) -> uint8_t * {
    switch (space) {
      case FLAT: return mem.at(a, n, w);
      case HEAP: return mem.at(L.heapBase + (uint32_t)a, n, w);
      case SLM:
        a = (uint32_t)a & ~0x10000000u;   // IGC tags valid local pointers with this bit (VALID_LOCAL_HIGH_BITS)
        if (a + n > t.g->slm.size()) throw Error("SLM access at " + std::to_string(a) + " beyond slm_size " + std::to_string(t.g->slm.size()));
        return t.g->slm.data() + a;
      default:
        a = (uint32_t)a;
        if (a + n > t.scratch.size()) throw Error("scratch access at " + std::to_string(a) + " beyond the scratch size " + std::to_string(t.scratch.size()));
        return t.scratch.data() + a;
    }
  };
  // A message takes its whole payload before it writes a register: what it loads may lie where its addresses did.
  uint8_t pa[32 * 8], data[2 * 32 * 8];
  auto payload = [&](const Opnd &o, uint8_t *to, uint32_t size) {
    if (o.base < (uint32_t)NGRF * GRF) memcpy(to, t.r + o.base, std::min(size, (uint32_t)NGRF * GRF - o.base));
  };
  payload(I.src[0], pa, sizeof pa);
  auto addr = [&](int l) -> uint64_t {
    return (asz == 3 ? rd<uint64_t>(pa + 8 * l) : asz == 2 ? (uint64_t)rd<uint32_t>(pa + 4 * l) : rd<uint16_t>(pa + 2 * l)) + immOff;
  };
  InstStat &is = stat[t.pc];
  const bool hasDst = I.dst.kind == Opnd::Reg;
  uint8_t *pd = hasDst ? t.r + I.dst.base : nullptr;
  const uint8_t *ps = I.src[1].kind == Opnd::Reg ? t.r + I.src[1].base : nullptr;
  if (ps && atomic) payload(I.src[1], data, sizeof data), ps = data;
  auto room = [&](const Opnd &o, int bytes) { if (o.base + bytes > (uint32_t)NGRF * GRF) throw Error("payload outside the register file"); };
  if (transpose) {                       // one block of nvec contiguous elements
    if (!(m & 1)) return;
    if (I.n != 1) throw Error("transposed LSC message with execution size > 1");
    int bytes = nvec * ms;
    is.bytes += bytes;
    uint64_t a = addr(0);
    if (a % ms) throw Error("misaligned block access");
    if (store) { room(I.src[1], bytes); memcpy(at(a, bytes, true), ps, bytes); }
    else if (hasDst) { room(I.dst, bytes); memcpy(pd, at(a, bytes, false), bytes); }
    return;
  }
  const int lanes = I.n <= 16 ? 16 : 32, stride = lanes * rs;
  if (ps && !atomic) room(I.src[1], nvec * stride);
  if (pd) room(I.dst, nvec * stride);
  is.bytes += (uint64_t)std::popcount(m) * nvec * ms;
  for (int l = 0; l < I.n; ++l) {
    if (!(m >> l & 1)) continue;
    uint64_t a = addr(l);
    if (a % ms) throw Error("misaligned access at " + std::to_string(a));
    if (atomic) {
      uint64_t x = 0, y = 0, nw = 0, old = 0;
      auto arg = [&](int k) -> uint64_t { const uint8_t *p = ps + k * stride + l * rs; return rs == 8 ? rd<uint64_t>(p) : rd<uint32_t>(p); };
      bool needX = op != 0x08 && op != 0x09 && op != 0x0A, two = op == 0x12 || op == 0x17;
      if (needX) { if (!ps) throw Error("atomic without data"); x = arg(0); }
      if (two) y = arg(1);
      uint8_t *p = at(a, ms, true);
      if (op >= 0x13 && op <= 0x17) {
        if (ms == 4) { uint32_t w; old = atomicFloat<uint32_t, float>(op, rd<uint32_t>(p), (uint32_t)x, (uint32_t)y, w); nw = w; }
        else if (ms == 8) { uint64_t w; old = atomicFloat<uint64_t, double>(op, rd<uint64_t>(p), x, y, w); nw = w; }
        else { uint16_t w; old = atomicFloat<uint16_t, _Float16>(op, rd<uint16_t>(p), (uint16_t)x, (uint16_t)y, w); nw = w; }
      } else if (ms == 4) { uint32_t w; old = atomicInt<uint32_t>(op, rd<uint32_t>(p), (uint32_t)x, (uint32_t)y, w); nw = w; }
      else if (ms == 8) { uint64_t w; old = atomicInt<uint64_t>(op, rd<uint64_t>(p), x, y, w); nw = w; }
      else if (ms == 2) { uint16_t w; old = atomicInt<uint16_t>(op, rd<uint16_t>(p), (uint16_t)x, (uint16_t)y, w); nw = w; }
      else throw Error("atomic data size");
      memcpy(p, &nw, ms);
      if (pd) { if (rs == 8) wr<uint64_t>(pd + l * 8, old); else wr<uint32_t>(pd + l * 4, (uint32_t)old); }
      continue;
    }
    uint8_t *p = at(a, ms * nvec, store);
    for (int v = 0; v < nvec; ++v) {
      if (store) { memcpy(p + v * ms, ps + v * stride + l * rs + (dsz == 6 ? 2 : 0), ms); continue; }
      if (!pd) continue;
      uint64_t x = 0;
      memcpy(&x, p + v * ms, ms);
      if (dsz == 6) x <<= 16;
      memcpy(pd + v * stride + l * rs, &x, rs);
    }
  }
}

}  // namespace xe
