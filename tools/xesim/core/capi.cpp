// capi.cpp - the C interface that the Python driver uses through ctypes.
#include "exec.h"
#include <chrono>

using namespace xe;
namespace { thread_local std::string gErr, gText; }
#define GUARD(expr) try { expr; return 0; } catch (const std::exception &e) { gErr = e.what(); return -1; }

extern "C" {
const char *xs_error() { return gErr.c_str(); }
void *xs_prog_new() { return new Program; }
void xs_prog_free(void *p) { delete (Program *)p; }
int xs_prog_parse(void *p, const char *text, uint32_t base) { GUARD(((Program *)p)->parse(text, base)) }
int xs_prog_patch(void *p, uint32_t addr, uint32_t v) { GUARD(((Program *)p)->patchImm(addr, v)) }
void xs_prog_extern(void *p, uint32_t addr, const char *sym) { ((Program *)p)->externs[addr] = sym; }
int xs_prog_size(void *p) { return (int)((Program *)p)->ins.size(); }
void *xs_mem_new() { return new Memory; }
void xs_mem_free(void *m) { delete (Memory *)m; }
int xs_mem_map(void *m, uint64_t a, uint64_t n, void *host, int ro, const char *name) { GUARD(((Memory *)m)->map(a, n, host, ro, name)) }
void xs_mem_unmap(void *m, uint64_t a) { ((Memory *)m)->unmap(a); }

// inst: 3 words an instruction (count, lanes, bytes); thr: 4 words a thread
int xs_run(void *p, void *m, const Launch *l, const uint8_t *payload, uint32_t n, uint64_t *inst, uint64_t *thr, uint64_t *total, double *secs) {
  Sim s(*(Program *)p, *(Memory *)m, *l);
  auto t0 = std::chrono::steady_clock::now();
  int rc = 0;
  try { s.run(payload, n); } catch (const std::exception &e) { gErr = e.what(); rc = -1; }
  *secs = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
  *total = s.total;
  for (size_t i = 0; i < s.stat.size(); ++i) { inst[3 * i] = s.stat[i].count; inst[3 * i + 1] = s.stat[i].lanes; inst[3 * i + 2] = s.stat[i].bytes; }
  for (size_t i = 0; i < s.threadStats.size(); ++i) {
    thr[4 * i] = s.threadStats[i].ins; thr[4 * i + 1] = s.threadStats[i].dpas; thr[4 * i + 2] = s.threadStats[i].sends; thr[4 * i + 3] = 0;
  }
  gText.clear();
  for (auto &w : s.warnings) gText += w.first + "\t" + std::to_string(w.second) + "\n";
  return rc;
}
const char *xs_warnings() { return gText.c_str(); }
}
