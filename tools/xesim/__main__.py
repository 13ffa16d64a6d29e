"""python -m xesim static DUMP [KERNEL] [--json] | compile SRC [--options ...] [--sycl ...]"""
import argparse
import dataclasses
import json
import sys
from pathlib import Path

from moe_xe.isa.dump import Dump
from moe_xe.isa.listing import summarize

from . import compile_bmg


def show(s):
    print(f"{s.kernel}: GRF {s.grf}, SIMD {s.simd}, spill {s.spill_bytes}, private {s.private_bytes}, SLM {s.slm_bytes}, barriers {s.barriers}, "
          f"stack calls {s.stack_calls}" + (f", undefined {list(s.undefined)}" if s.undefined else ""))
    print(f"  {s.instructions} instructions: dpas {s.dpas}, mad {s.mad}, messages {s.messages}, sync {s.sync}, other {s.other}")
    for kind, n in sorted(s.message_kinds.items()):
        print(f"    {n:6d}  {kind}")
    for l in s.loops:
        ratio = f"{l.other_per_dpas:.2f} per dpas" if l.dpas else f"{l.other_per_mad:.2f} per mad"
        print(f"  loop at offsets {l.start}..{l.end}: dpas {l.dpas}, mad {l.mad}, messages {l.messages} {l.message_kinds}, sync {l.sync}, "
              f"other {l.other} {l.other_kinds}; all others {ratio}")


def main():
    ap = argparse.ArgumentParser(prog="xesim", description=__doc__)
    sub = ap.add_subparsers(dest="cmd", required=True)
    p = sub.add_parser("static", help="static summary of an ocloc dump")
    p.add_argument("dump", type=Path)
    p.add_argument("kernel", nargs="?")
    p.add_argument("--json", action="store_true")
    p = sub.add_parser("compile", help="compile a SYCL source or a .spv for BMG; prints the dump's folder and the kernels")
    p.add_argument("source")
    p.add_argument("--options", default="", help="for ocloc, e.g. -ze-intel-256-GRF-per-thread")
    p.add_argument("--sycl", action="append", default=[], help="one option for the SYCL compiler (repeat; use --sycl=-O2)")
    a = ap.parse_args()
    if a.cmd == "compile":
        build = compile_bmg(a.source, a.options, a.sycl)
        print(build.dump.folder, *build.names, sep="\n  ")
        return
    dump = Dump(a.dump)
    summaries = [summarize(dump, name) for name in ([a.kernel] if a.kernel else dump.kernels)]
    if a.json:
        json.dump([dataclasses.asdict(s) for s in summaries], sys.stdout, indent=1)
        print()
    for s in summaries if not a.json else ():
        show(s)


main()
