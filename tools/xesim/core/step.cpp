// step.cpp - executes one instruction: predicate, control flow, and who computes the rest.
#include "operands.h"
#include <cfenv>

namespace xe {
void Sim::setFlags(Thread &t, const Inst &I, uint32_t m, uint32_t res) {
  uint8_t *p = t.r + ARF_F;
  uint64_t lo = rd<uint64_t>(p), hi = rd<uint64_t>(p + 8);
  int bit = I.flag + I.moff;
  unsigned __int128 f = ((unsigned __int128)hi << 64) | lo;
  f &= ~((unsigned __int128)m << bit);
  f |= (unsigned __int128)(res & m) << bit;
  wr<uint64_t>(p, (uint64_t)f);
  wr<uint64_t>(p + 8, (uint64_t)(f >> 64));
}

void Sim::alu(Thread &t, const Inst &I, uint32_t m, uint32_t pr) {
  if (I.op == OP_MADM || (I.op == OP_MATH && (I.fn == MF_INVM || I.fn == MF_RSQTM))) { mathm(t, I, m); return; }
  bool fl = false;
  for (auto &s : I.src) if (s.kind != Opnd::None && s.kind != Opnd::Null && (isFloat(s.ty) || s.ty == VF)) fl = true;
  for (auto &s : I.src) {
    if (s.isTm) wr<uint64_t>(t.r + ARF_TM, total);
    if (s.isCe) wr<uint32_t>(t.r + ARF_CE, t.am);
  }
  if (fl && I.op >= OP_AND && I.op <= OP_BFI2) fl = false;
  if (fl) aluFloat(t, I, m, pr); else aluInt(t, I, m, pr);
  if (I.dst.kind == Opnd::Reg && I.dst.base >= (uint32_t)ARF_CR && I.dst.base < (uint32_t)ARF_CR + 4) {
    int rm = rd<uint32_t>(t.r + ARF_CR) >> 4 & 3;
    if (rm != t.rm) {
      static const int mode[4] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
      t.rm = rm;
      fesetround(mode[rm]);
    }
  }
}

// Functions that IGC left undefined (SYCL device library); arguments and result
// follow the vISA stack-call convention: r26 upwards.
void Sim::callExtern(Thread &t, const std::string &sym, uint32_t m) {
  int n = (int)L.simd;
  uint8_t *p = t.r + 26 * GRF;
  if (sym == "__devicelib_ConvertFToBF16INTEL") {
    uint16_t v[32];
    for (int i = 0; i < n; ++i) if (m >> i & 1) v[i] = f2bf(rd<float>(mem.at(rd<uint64_t>(p + 8 * i), 4, false)));
    for (int i = 0; i < n; ++i) if (m >> i & 1) wr<uint16_t>(p + 2 * i, v[i]);
  } else if (sym == "__devicelib_ConvertBF16ToFINTEL") {
    float v[32];
    for (int i = 0; i < n; ++i) if (m >> i & 1) v[i] = bf2f(rd<uint16_t>(mem.at(rd<uint64_t>(p + 8 * i), 2, false)));
    for (int i = 0; i < n; ++i) if (m >> i & 1) wr<float>(p + 4 * i, v[i]);
  } else throw Error("call of the undefined function " + sym);
  warn("call of undefined " + sym + " was emulated");
}

bool Sim::step(Thread &t) {
  const Inst &I = prog.ins[t.pc];
  const int n = I.n;
  const uint32_t all = n == 32 ? ~0u : (1u << n) - 1;
  uint32_t em = I.noMask ? all : (t.am >> I.moff) & all;
  uint32_t pr = all;
  if (I.pred >= 0) {
    int bit = I.pred + I.moff;
    uint64_t w = rd<uint64_t>(t.r + ARF_F + (bit >= 64 ? 8 : 0));
    pr = (uint32_t)(w >> (bit & 63)) & all;
    if ((bit & 63) + n > 64) throw Error("predicate crosses the flag file");
    if (I.predInv) pr = ~pr & all;
    if (I.predMode == 1) pr = (pr & (I.noMask ? all : em)) ? all : 0;
    if (I.predMode == 2) pr = ((pr | ~(I.noMask ? all : em)) & all) == all ? all : 0;
  }
  uint32_t m = I.op == OP_SEL && I.cmod == CM_NONE ? em : em & pr;
  InstStat &is = stat[t.pc];
  ++is.count;
  is.lanes += (uint64_t)std::popcount(m);
  ++t.st.ins;
  ++total;
  int next = t.pc + 1;
  switch (I.op) {
    case OP_NOP: case OP_SYNC: break;
    case OP_ILLEGAL: throw Error("illegal instruction executed");
    case OP_SYNC_BAR: {
      int id = (int)I.src[0].imm;
      if (id >= 32) throw Error("barrier id");
      if (!t.signaled[id]) throw Error("barrier wait without a signal");
      if (t.g->bar[id].gen == t.sigGen[id]) {   // not complete yet
        --is.count; --t.st.ins; --total;
        t.waiting = true; t.waitId = id;
        return false;
      }
      t.signaled[id] = false;
      break;
    }
    case OP_JMPI: if (m & 1) next = I.jip; break;
    case OP_GOTO: {
      uint32_t taken = (m << I.moff), act = em << I.moff, rest = act & ~taken;
      if (I.moff || I.noMask) throw Error("form of goto");
      for (int i = 0; i < n; ++i) if (taken >> i & 1) t.pcip[i] = I.uip;
      if (I.branchB) {
        if (taken) {
          for (int i = 0; i < n; ++i) if (rest >> i & 1) t.pcip[i] = t.pc + 1;
          t.am = taken;
          next = I.uip;
        } 
        if (taken) for (int i = 0; i < n; ++i) if (taken >> i & 1) t.pcip[i] = -1;
      } else {
        t.am = rest;
        if (!rest) next = I.jip;
      }
      break;
    }
    case OP_JOIN:
      for (int i = 0; i < n; ++i) if (t.pcip[i] == t.pc) { t.am |= 1u << i; t.pcip[i] = -1; }
      if (!t.am) next = I.jip;
      break;
    case OP_CALL: case OP_CALLA: {
      uint32_t ret = next < (int)prog.ins.size() ? prog.ins[next].addr : 0;
      uint32_t target = 0;
      if (I.op == OP_CALLA) {
        target = rd<uint32_t>(t.r + I.src[0].base);
        auto e = prog.externs.find(target);
        if (e != prog.externs.end()) { callExtern(t, e->second, m); break; }
      }
      wr<uint32_t>(t.r + I.dst.base, ret);
      wr<uint32_t>(t.r + I.dst.base + 4, t.am);
      t.am = m;
      if (I.op == OP_CALL) next = I.jip;
      else {
        auto it = prog.byAddr.find(target);
        if (it == prog.byAddr.end()) throw Error("call of an unknown address");
        next = it->second;
      }
      break;
    }
    case OP_RET: {
      uint32_t ret = rd<uint32_t>(t.r + I.src[0].base);
      if ((m << I.moff) != t.am) throw Error("partial ret is not supported");
      t.am = rd<uint32_t>(t.r + I.src[0].base + 4);
      auto it = prog.byAddr.find(ret);
      if (it == prog.byAddr.end()) throw Error("return to an unknown address");
      next = it->second;
      break;
    }
    case OP_IF: case OP_ELSE: case OP_ENDIF: case OP_WHILE: case OP_BREAK: case OP_CONT:
      throw Error("structured control flow (if/else/endif/while) is not supported; IGC emits goto/join for BMG");
    case OP_DPAS: dpas(t, I); ++t.st.dpas; break;
    case OP_SEND:
      ++t.st.sends;
      if (I.eot) { t.done = true; return false; }
      send(t, I, m);
      break;
    default:
      alu(t, I, m, pr);
  }
  t.pc = next;
  return true;
}
}  // namespace xe
