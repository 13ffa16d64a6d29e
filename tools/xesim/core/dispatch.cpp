// dispatch.cpp - payloads, work-groups, and which thread runs next.
#include "bits.h"
#include "exec.h"
#include <cfenv>

namespace xe {
namespace {
constexpr uint32_t kPayloadOffset = 0x10000;      // of the payload, from the heap's base; a thread finds it in r0.0
constexpr uint32_t kMaxThreads = 64;              // of one work-group
constexpr int kRounding[4] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};

// payload in memory: cross-thread data, then the local ids of every thread of a work-group
std::vector<uint8_t> payloadHeap(const Launch &L, uint32_t perGroup, const uint8_t *payload, uint32_t size) {
  std::vector<uint8_t> heap(L.crossMem + (size_t)perGroup * L.perThread + 4096, 0);
  if (size > L.inlineSize) {
    if (size - L.inlineSize > L.crossMem) throw Error("cross-thread data does not fit");
    memcpy(heap.data(), payload + L.inlineSize, size - L.inlineSize);
  }
  const uint32_t d0 = L.walk[0], d1 = L.walk[1], d2 = L.walk[2];
  for (uint32_t th = 0; th < perGroup; ++th)
    for (uint32_t l = 0; l < L.simd; ++l) {
      uint32_t item = th * L.simd + l, id[3];
      id[d0] = item % L.local[d0];
      id[d1] = item / L.local[d0] % L.local[d1];
      id[d2] = item / (L.local[d0] * L.local[d1]);
      for (uint32_t q = 0; q < L.nIds; ++q) wr<uint16_t>(heap.data() + L.crossMem + (size_t)th * L.perThread + q * 64 + l * 2, (uint16_t)id[q]);
    }
  return heap;
}

// registers and scratch are undefined at the start: junk, so that undefined uses show
void clear(Thread &t, uint32_t scratchSize) {
  memset(t.r, 0xA5, sizeof t.r);
  memset(t.r + ARF_ACC, 0, REGFILE - ARF_ACC);
  memset(t.acc64, 0, sizeof t.acc64);
  for (auto &x : t.mme) for (auto &y : x) y = 0;
  for (auto &x : t.pcip) x = -1;
  for (int i = 0; i < 32; ++i) { t.sigGen[i] = 0; t.signaled[i] = false; }
  t.scratch.assign(scratchSize, 0xCD);
  t.done = t.waiting = false;
  t.st = {};
  t.rm = 0;
}

// thread number tid of group g in hardware slot `slot`: dispatch mask, r0, inline payload, state registers
void dispatch(Thread &t, Group &g, const Launch &L, uint32_t tid, uint32_t slot, uint32_t items, const uint8_t *payload, uint32_t payloadSize) {
  clear(t, L.scratchSize);
  t.g = &g;
  t.tid = (int)tid;
  t.slot = (int)slot;
  const uint32_t left = std::min(items - tid * L.simd, L.simd);
  t.am = t.dmask = left >= 32 ? ~0u : (1u << left) - 1;
  uint32_t r0[16] = {};
  r0[0] = kPayloadOffset;
  r0[1] = g.id[0];
  r0[2] = tid | ((uint32_t)g.size & 255) << 24;
  r0[5] = 0x40000 | (slot & 511);
  r0[6] = g.id[1];
  r0[7] = g.id[2];
  memcpy(t.r, r0, 64);
  memset(t.r + GRF, 0, GRF);
  memcpy(t.r + GRF, payload, std::min(payloadSize, L.inlineSize));
  wr<uint32_t>(t.r + ARF_SR, (slot & 7) | (slot >> 3 & 7) << 4);
  wr<uint32_t>(t.r + ARF_SR + 8, t.dmask);
  wr<uint32_t>(t.r + ARF_MSG, slot >> 6);
}

std::string where(const Thread &t, const Inst &I, uint32_t entry) {
  char b[160];
  snprintf(b, sizeof b, "\n  group (%u,%u,%u) thread %d, active lanes %#x, offset %u: ", t.g->id[0], t.g->id[1], t.g->id[2], t.tid, t.am, I.addr - entry);
  return b + I.text;
}
}  // namespace

void Sim::run(const uint8_t *payload, uint32_t payloadSize) {
  const uint32_t items = L.local[0] * L.local[1] * L.local[2];
  const uint32_t perGroup = (items + L.simd - 1) / L.simd;
  const uint64_t nGroups = (uint64_t)L.groups[0] * L.groups[1] * L.groups[2];
  const uint32_t resident = (uint32_t)std::min<uint64_t>(L.maxGroups, nGroups);
  if (perGroup > kMaxThreads) throw Error("more than 64 threads in a work-group");
  auto entry = prog.byAddr.find(L.entry);
  if (entry == prog.byAddr.end()) throw Error("no instruction at the entry point");

  std::vector<uint8_t> heap = payloadHeap(L, perGroup, payload, payloadSize);
  mem.map(L.heapBase + kPayloadOffset, heap.size(), heap.data(), true, "payload");
  struct Unmap { Memory &m; uint64_t a; ~Unmap() { m.unmap(a); fesetround(FE_TONEAREST); } } unmap{mem, L.heapBase + kPayloadOffset};

  std::mt19937_64 rng(L.seed);
  std::vector<Group> groups(resident);
  std::vector<std::unique_ptr<Thread>> threads((size_t)resident * perGroup);
  for (auto &p : threads) { p = std::make_unique<Thread>(); p->done = true; }
  std::vector<int> runnable;
  uint64_t nextGroup = 0;
  threadStats.assign(nGroups * perGroup, {});

  auto startGroup = [&](uint32_t place) {
    Group &g = groups[place];
    g.id[0] = (uint32_t)(nextGroup % L.groups[0]);
    g.id[1] = (uint32_t)(nextGroup / L.groups[0] % L.groups[1]);
    g.id[2] = (uint32_t)(nextGroup / ((uint64_t)L.groups[0] * L.groups[1]));
    g.slm.assign(L.slmSize, 0xCD);            // undefined at the start, too
    for (auto &b : g.bar) b = {};
    g.size = g.live = (int)perGroup;
    for (uint32_t q = 0; q < perGroup; ++q) {
      const uint32_t index = place * perGroup + q;
      Thread &t = *threads[index];
      dispatch(t, g, L, q, index, items, payload, payloadSize);
      t.groupSlot = (int)place;
      t.pc = entry->second;
      runnable.push_back((int)index);
    }
    ++nextGroup;
  };
  auto wake = [&](const Group &g, int place) {       // the threads of this group whose barrier completed
    for (uint32_t q = 0; q < perGroup; ++q) {
      Thread &w = *threads[(size_t)place * perGroup + q];
      if (!w.waiting || w.done || g.bar[w.waitId].gen == w.sigGen[w.waitId]) continue;
      w.waiting = false;
      runnable.push_back((int)(place * perGroup + q));
    }
  };
  for (uint32_t g = 0; g < resident; ++g) startGroup(g);

  while (!runnable.empty()) {
    const size_t pick = rng() % runnable.size();
    Thread &t = *threads[runnable[pick]];
    uint32_t left = 1 + (uint32_t)(rng() % L.quantum);
    if (t.rm) fesetround(kRounding[t.rm]);
    try {
      while (left-- && step(t)) {}
    } catch (const std::exception &e) { throw Error(e.what() + where(t, prog.ins[t.pc], L.entry)); }
    if (t.rm) fesetround(FE_TONEAREST);
    if (total > L.maxIns) throw Error("instruction limit reached (" + std::to_string(L.maxIns) + ")");
    if (t.waiting || t.done) { runnable[pick] = runnable.back(); runnable.pop_back(); }
    Group &g = *t.g;
    if (t.done) {
      const uint64_t group = ((uint64_t)g.id[2] * L.groups[1] + g.id[1]) * L.groups[0] + g.id[0];
      threadStats[group * perGroup + t.tid] = t.st;
      --g.live;
      for (auto &b : g.bar) if (b.prod | b.cons) checkBarrier(g, b);
      if (g.live == 0 && nextGroup < nGroups) startGroup((uint32_t)t.groupSlot);
    }
    if (barrierEvent) wake(g, t.groupSlot);
    barrierEvent = false;
  }
  uint64_t stuck = 0;
  for (auto &p : threads) if (!p->done) ++stuck;
  if (stuck) throw Error("deadlock: " + std::to_string(stuck) + " threads wait at a barrier");
}
}  // namespace xe
