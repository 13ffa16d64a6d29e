"""moe_xe.isa: SPIR-V from source, machine code from SPIR-V, and what the listing says."""
import os
from pathlib import Path

import pytest

from moe_xe.isa import listing, ocloc, spirv

SOURCE = (Path(__file__).parent / "multiply.cpp").read_text()
needs_compiler = pytest.mark.skipif(bool(spirv.missing()), reason=spirv.missing())
needs_ocloc = pytest.mark.skipif(bool(spirv.missing() or ocloc.missing()), reason=spirv.missing() or ocloc.missing())

LISTING = """
L0:
(W)     mov (16|M0)              r2.0<1>:ud    r0.0<1;1,0>:ud                   {Compacted}
L8:
        add (16|M0)              r3.0<1>:d     r3.0<1;1,0>:d     1:w
L24:
(W)     send.ugm (1|M0)          r40      r4  null:0  0x0            0x02400203           {I@7,$2} // wr:1+0, rd:4; load_block2d.ugm.d16.a64.ca.cc.flat[A+(0x10,0x4)]
(W)     send.ugm (1|M0)          null     r4  null:0  0x0            0x02400203           {$3} // wr:1+0, rd:0; load_block2d.ugm.d16.a64
        sync.nop                             null                             {Compacted,$2.dst}
        dpas.8x8 (16|M0)         r94:f         r94:f             r27:bf            r15.0:bf         {Atomic,Compacted}
        dpas.8x4 (16|M0)         r94:f         r94:f             r27:bf            r15.0:bf         {Compacted}
        mad (16|M0)              r5.0<1>:d     r5.0<1;0>:d       r6.0<1;0>:d       r7.0<0>:w
(W&f0.1) jmpi                                L24
(W&~f1.0) jmpi                               L8
(W)     send.gtwy (1|M0)         null     r127  null:0  0x0            0x02000010           {EOT,F@1} // wr:1+0, rd:0; end of thread
        illegal
"""


def test_listing_of_nested_loops():
    code = listing.parse(LISTING)
    assert [(i.address, i.opcode) for i in code[:4]] == [(0, "mov"), (8, "add"), (24, "send.ugm"), (40, "send.ugm")]
    assert code[5].macs == 8 * 16 * 16 and code[6].macs == 4 * 16 * 16
    assert code[-1].opcode == "illegal" and len(listing.executable(code)) == len(code) - 1
    assert listing.loops(code) == [(2, 8), (1, 9)]
    inner, = listing.multiplying_loops(code)
    assert (inner.start, inner.end) == (24, code[8].address)
    assert (inner.instructions, inner.dpas, inner.messages, inner.sync, inner.other) == (7, 2, 2, 1, 2)
    assert inner.other_per_dpas == 2.5 and inner.mad == 0 and inner.other_per_mad is None      # an integer mad is no FMA
    assert inner.message_kinds == {"load_block2d.ugm.d16.a64": 1, "prefetch_block2d.ugm.d16.a64": 1}


def test_two_branches_to_one_head_are_one_loop():
    code = listing.parse("""
L0:
        mad (16|M0)              r5.0<1>:f     r5.0<1;0>:f       r6.0<1;0>:f       r7.0<0>:f
(W&f0.0) jmpi                                L0
        dpas.8x8 (16|M0)         r94:f         r94:f             r27:bf            r15.0:bf
(W&f0.1) jmpi                                L0
""")
    loop, = listing.multiplying_loops(code)
    assert (loop.instructions, loop.dpas, loop.mad, loop.other) == (4, 1, 1, 3)


@pytest.mark.parametrize("operands,decoded,expected", [
    ("r1 r2 null:0 0x0 0x0", "wr:2+0, rd:4; load.slm.d32x4.a32", ("slm_load", "load.slm.d32x4.a32")),
    ("null r2 r4:4 0x0 0x0", "wr:1+4, rd:0; store.ugm.d32x16t.a32.ss[a0.2][A]", ("scratch_store", "store.ugm.d32x16t.a32.ss[a0.2]")),
    ("r1 r2 r4:4 0x0 0x0", "wr:1+4, rd:1; atomic_iinc.ugm.d32.a64.uc.uc", ("atomic", "atomic_iinc.ugm.d32.a64")),
    ("null r2 null:0 0x0 0x0", "wr:1+0, rd:0; load.ugm.d32.a64.ca.ca", ("prefetch", "prefetch.ugm.d32.a64")),
    ("r1 r2 null:0 0x0 0x0", "wr:1+0, rd:1; load.ugm.d32x8t.a32.ca.cc.bti[255]", ("payload", "load.ugm.d32x8t.a32.bti[255]")),
    ("r96 r101:1 null:0 0x8803", "load_block2d.ugm.d16.a64 [src0]", ("load_block2d", "load_block2d.ugm.d16.a64"))])     # as for cri
def test_messages(operands, decoded, expected):
    ins, = listing.parse(f"(W)     send.ugm (1|M0)  {operands} {{$1}} // {decoded}")
    assert (ins.message_class, ins.message) == expected


def test_not_a_listing():
    with pytest.raises(ValueError, match="not an instruction: 42"):
        listing.parse("L0:\n42\n")


@needs_compiler
def test_spirv_is_reproducible(tmp_path, monkeypatch):
    first = spirv.compile_to_spirv(SOURCE)
    monkeypatch.setenv("SYCL_CACHE_PERSISTENT", "1")
    monkeypatch.setenv("SYCL_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ONEAPI_DEVICE_SELECTOR", "level_zero:gpu")
    _, second = spirv.compile_to_spirv(SOURCE), spirv.compile_to_spirv(SOURCE)
    assert first[:4] == bytes.fromhex("03022307") and first == second
    assert b"dpas_kernel" in first and b"mad_kernel" in first       # both in one image
    assert spirv.compile_to_spirv(SOURCE, ["-Ddpas_kernel=other"]) != first


@needs_compiler
def test_source_errors_are_told():
    with pytest.raises(spirv.CompileError, match="undeclared identifier 'oops'"):
        spirv.compile_to_spirv("int f() { return oops; }\n")


@needs_ocloc
@pytest.mark.few(3)
@pytest.mark.parametrize("device", ["bmg", "pvc", "lnl-m", "ptl-h", "cri"])
def test_summary_on_every_device(device):
    dump = ocloc.build(spirv.compile_to_spirv(SOURCE), device, "-ze-intel-256-GRF-per-thread")
    assert sorted(dump.kernels) == ["dpas_kernel", "mad_kernel"]
    s = listing.summarize(dump, "dpas_kernel")
    assert (s.grf, s.simd, s.spill_bytes, s.slm_bytes, s.undefined) == (256, 16, 0, 0, ())
    assert s.dpas_loops == len(s.loops) >= 1
    for loop in s.loops:
        steps = loop.dpas // 4
        assert loop.dpas == 4 * steps and loop.macs == loop.dpas * 8 * 16 * 16 and loop.messages >= 5 * steps
        assert loop.instructions == loop.dpas + loop.messages + loop.sync + loop.other
        assert loop.other_per_dpas == (loop.messages + loop.sync + loop.other) / loop.dpas
    s = listing.summarize(dump, "mad_kernel")
    assert s.dpas == s.dpas_loops == 0 and len(s.loops) == 1
    assert s.loops[0].mad == 1 and s.loops[0].messages == 2 and s.loops[0].other_per_mad == s.loops[0].instructions - 1
    with pytest.raises(KeyError, match="no kernel nothing"):
        listing.summarize(dump, "nothing")


@needs_ocloc
def test_dumps_are_kept(tmp_path, monkeypatch):
    module = spirv.compile_to_spirv(SOURCE)
    root = ocloc.find()
    monkeypatch.setattr(ocloc, "find", lambda: root)
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path))
    first = ocloc.build(module, "bmg")
    assert first.folder.is_relative_to(tmp_path)
    assert ocloc.build(module, "bmg", "-ze-intel-256-GRF-per-thread").folder != first.folder
    monkeypatch.setattr(ocloc, "_build", lambda *_: pytest.fail("compiled again"))
    assert ocloc.build(module, "bmg-g21") == first                  # the short name is the same device


@needs_ocloc
def test_another_process_may_be_faster(tmp_path, monkeypatch):
    module, root, compile_module, nested = spirv.compile_to_spirv(SOURCE), ocloc.find(), ocloc._build, []

    def overtaken(*args):
        compile_module(*args)
        if not nested:
            nested.append("in progress")
            nested[0] = ocloc.build(module, "bmg")
    monkeypatch.setattr(ocloc, "find", lambda: root)
    monkeypatch.setattr(ocloc, "_build", overtaken)
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path))
    dump = ocloc.build(module, "bmg")
    assert dump == nested[0] and dump.kernels
    assert list(dump.folder.parent.iterdir()) == [dump.folder]


@needs_ocloc
def test_failures_leave_nothing(tmp_path, monkeypatch):
    root = ocloc.find()
    monkeypatch.setattr(ocloc, "find", lambda: root)
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path))
    with pytest.raises(ocloc.OclocError, match="no_such_device"):
        ocloc.build(b"", "no_such_device")
    assert list((tmp_path / "ocloc").iterdir()) == []


def test_dumps_of_others_are_not_read(tmp_path, monkeypatch):
    """A dump is machine code that somebody runs."""
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ocloc, "find", lambda: [__file__])
    def keep(ocloc, work, *_):
        (work / "dump").mkdir()
    monkeypatch.setattr(ocloc, "_build", keep)
    kept = ocloc.build(b"module", "bmg").folder
    assert kept.parent.stat().st_mode & 0o777 == kept.parent.parent.stat().st_mode & 0o777 == 0o700
    for folder in (kept.parent, kept.parent.parent):
        folder.chmod(0o777)
        with pytest.raises(ocloc.OclocError, match="can be written by others.*MOE_XE_CACHE_DIR"):
            ocloc.build(b"module", "bmg")
        folder.chmod(0o700)
    assert ocloc.build(b"module", "bmg").folder == kept
    for name, used in (("left.work", 0), ("of_another.work", None)):
        (kept.parent / name).mkdir()
        os.utime(kept.parent / name, used if used is None else (used, used))
    ocloc.build(b"module", "bmg")
    assert not (kept.parent / "left.work").exists() and (kept.parent / "of_another.work").exists()


def test_where_ocloc_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(ocloc.OVERRIDE, raising=False)
    assert ocloc.find() is None and "tools/install-ocloc" in ocloc.missing()
    with pytest.raises(FileNotFoundError, match="tools/install-ocloc"):
        ocloc.build(b"", "bmg")
    on_path = tmp_path / "ocloc"
    on_path.write_text("#!/bin/sh\n")
    on_path.chmod(0o755)
    assert ocloc.find() == [str(on_path)] and ocloc.missing() == ""
    root = ocloc.private_root()
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/ocloc-26.1").touch()
    assert ocloc.find() == [str(on_path)]                           # an unfinished root does not count
    (root / ".complete").touch()
    assert ocloc.find()[-1] == str(root / "usr/bin/ocloc-26.1")
    monkeypatch.setenv(ocloc.OVERRIDE, str(on_path))
    assert ocloc.find() == [str(on_path)]
    monkeypatch.setenv(ocloc.OVERRIDE, str(tmp_path / "absent"))
    assert ocloc.find() is None


def test_missing_compiler_is_told(monkeypatch):
    monkeypatch.setattr(spirv, "_compiler", lambda: None)
    with pytest.raises(FileNotFoundError, match="spirv_compiler is not in moe_xe/bin"):
        spirv.compile_to_spirv(SOURCE)
