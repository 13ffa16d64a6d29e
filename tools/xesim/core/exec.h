// exec.h - one hardware thread, memory, and the dispatcher.
#pragma once
#include "isa.h"
#include <cstring>
#include <map>
#include <memory>
#include <random>

namespace xe {

// Simulated memory: host buffers mapped at simulated addresses, bounds checked.
struct Memory {
  struct Region { uint64_t base, size; uint8_t *host; bool readonly; std::string name; };
  std::map<uint64_t, Region> regions;
  const Region *last = nullptr;
  void map(uint64_t base, uint64_t size, void *host, bool ro, const char *name);
  void unmap(uint64_t base);
  uint8_t *slow(uint64_t a, uint64_t n, bool write);
  inline uint8_t *at(uint64_t a, uint64_t n, bool write) {
    a &= (1ull << 57) - 1;   // the upper bits of a pointer are tags
    if (last && a >= last->base && a - last->base + n <= last->size && !(write && last->readonly)) return last->host + (a - last->base);
    return slow(a, n, write);
  }
};

// producers and consumers that arrived / are expected in the running generation
struct Barrier { uint32_t prod = 0, cons = 0, needProd = 0, needCons = 0; bool activeOnly = false; uint64_t gen = 0; };

struct Group {
  uint32_t id[3];
  std::vector<uint8_t> slm;
  Barrier bar[32];
  int live = 0, size = 0;
};

struct ThreadStat { uint64_t ins = 0, dpas = 0, sends = 0, lanes = 0; };

struct Thread {
  alignas(64) uint8_t r[REGFILE];
  int64_t acc64[16 * 16 + 32];        // integer accumulators are wider than 32 bits
  __float128 mme[8][32];              // the extra mantissa bits of mme registers
  int32_t pcip[32];
  uint32_t am = 0, dmask = 0;         // active lanes, dispatched lanes
  int32_t pc = 0;
  bool done = false, waiting = false;
  int waitId = 0;
  uint64_t sigGen[32];
  bool signaled[32];
  Group *g = nullptr;
  int slot = 0, groupSlot = 0, tid = 0;
  std::vector<uint8_t> scratch;
  int rm = 0;                         // rounding mode, from cr0
  ThreadStat st;
};

// LSC operations (descriptor bits 5:0); atomics are 0x08 to 0x1A
enum LscOp { LD = 0, LDQ = 2, LD2D = 3, ST = 4, STQ = 6, ST2D = 7, FENCE = 0x1F };

struct InstStat { uint64_t count = 0, lanes = 0, bytes = 0; };

struct Launch {                        // mirrored in Python with ctypes
  uint32_t groups[3], local[3];        // x, y, z
  uint32_t simd, slmSize, scratchSize, inlineSize;
  uint32_t crossMem, perThread, nIds, entry;
  uint64_t heapBase;                   // where bti[255] A32 accesses go
  uint64_t seed, maxIns;
  uint32_t maxGroups, quantum;
  uint8_t walk[4];
  uint32_t pad;
};

struct Sim {
  Program &prog;
  Memory &mem;
  Launch L;
  std::vector<InstStat> stat;
  std::vector<ThreadStat> threadStats;
  std::map<std::string, uint64_t> warnings;
  uint64_t total = 0;
  bool barrierEvent = false;           // some barrier completed: wake its waiters
  Sim(Program &p, Memory &m, const Launch &l) : prog(p), mem(m), L(l), stat(p.ins.size()) {}
  void run(const uint8_t *payload, uint32_t payloadSize);

 private:
  void checkBarrier(Group &g, Barrier &b);
  bool step(Thread &t);                // false: the thread has to stop (barrier, EOT)
  void alu(Thread &t, const Inst &I, uint32_t m, uint32_t pr);
  void aluInt(Thread &t, const Inst &I, uint32_t m, uint32_t pr);
  void aluFloat(Thread &t, const Inst &I, uint32_t m, uint32_t pr);
  template <class R> void aluReal(Thread &t, const Inst &I, uint32_t m, uint32_t pr);
  void mathm(Thread &t, const Inst &I, uint32_t m);
  void dpas(Thread &t, const Inst &I);
  void send(Thread &t, const Inst &I, uint32_t m);
  void lsc(Thread &t, const Inst &I, uint32_t m);
  void block2d(Thread &t, const Inst &I);
  void callExtern(Thread &t, const std::string &sym, uint32_t m);
  void setFlags(Thread &t, const Inst &I, uint32_t m, uint32_t res);
  void warn(const std::string &w) { ++warnings[w]; }
};
}  // namespace xe
