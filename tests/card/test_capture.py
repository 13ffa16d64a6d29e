"""What a graph of commands can record: a known call on xpu only launches. The driver's trace says what else was asked of it.

A recording allows no wait, no copy to the host and no memory but that of torch's allocator; and its replay is right for whatever
the same buffers hold then.
"""
from __future__ import annotations

import re

from .conftest import XPU

PROGRAM = XPU + '''
import os
from moe_xe.ops.gemm.grouped_gemm import INPUTS, Inputs
from moe_xe.ops.submission import Repeat
from tests.ops.block.case import make, moved

def block(device="xpu"):
    case = make(9, 4, 2, dtype=torch.bfloat16, weights_dtype=torch.bfloat16)
    return {name: moved(value, device) for name, value in case.items()}

def mark(text):
    os.write(2, f"MARK {text}\\n".encode())     # at once: another thread of the driver writes there, too

arguments = block()
x, w2, ids = arguments["hidden_states"], arguments["w2"], arguments["topk_ids"]
size = moe_xe.fused_moe_workspace_bytes(len(x), ids.shape[1], x.shape[1], w2.shape[2], len(w2))
buffers = dict(out=torch.empty_like(x), workspace=torch.empty(size, dtype=torch.uint8, device="xpu"))
logits = torch.randn(len(x), len(w2), device="xpu")
rows = torch.tensor([len(x) - 5, 0, 3, 2], dtype=torch.int32, device="xpu")
gemm_out = torch.empty(len(x), w2.shape[1], dtype=x.dtype, device="xpu")
narrow = torch.randn(len(x), w2.shape[2], device="xpu").to(x.dtype)
steps = {
    "block": lambda: moe_xe.fused_moe(**arguments, **buffers),
    "block in four": lambda: moe_xe.fused_moe(**arguments, **buffers, fusions=moe_xe.Fusions(launches=False)),
    "block, new result": lambda: moe_xe.fused_moe(**arguments),
    "gemm": lambda: moe_xe.grouped_gemm(narrow, w2, rows, out=gemm_out),
    "route": lambda: moe_xe.route(logits, 2),
    "op": lambda: torch.ops.moe_xe.grouped_gemm(*INPUTS.flatten(Inputs(narrow, w2, rows)), x.dtype, "counts", "dynamic", "", False),
}
for step in steps.values():
    kept = [step() for _ in range(2)]
torch.xpu.synchronize()
repeats, run = [], Repeat.run
Repeat.run = lambda *arguments: repeats.append(1) or run(*arguments)
for name, step in steps.items():
    mark(name)
    step()
    mark("end")
assert len(repeats) == len(steps)
torch.xpu.synchronize()

# replayed with other contents of the same buffers
other = block()
for name, value in other.items():
    if isinstance(value, torch.Tensor):
        arguments[name].copy_(value)
results = []
for name in ("block", "block in four"):
    buffers["out"].fill_(float("nan"))
    torch.xpu.synchronize()
    mark(name.replace("block", "replay"))
    steps[name]()
    mark("end")
    torch.xpu.synchronize()
    results.append(buffers["out"].cpu())
from moe_xe.ops.calls import known_calls
known_calls().clear()
assert torch.equal(results[0], moe_xe.fused_moe(**other).cpu()) and torch.equal(*results)
'''

LAUNCHES = {"block": 1, "block in four": 4, "block, new result": 1, "gemm": 1, "route": 1, "op": 1, "replay": 1, "replay in four": 4}
SUBMITS = {"zeKernelSetGroupSize", "zeKernelSetArgumentValue", "zeKernelSetIndirectAccess", "zeCommandListAppendLaunchKernel",
           "zeCommandListAppendLaunchKernelWithArguments", "zeCommandListAppendMemoryFill"}
ALLOCATES = {"zeMemAllocDevice", "zeContextMakeMemoryResident", "zeMemGetAllocProperties"}


def test_a_known_call_only_launches(on_the_card):
    printed = on_the_card(PROGRAM, ZESIM_TRACE="1")
    sections = dict(re.findall(r"^MARK (.*)\n((?:(?!MARK).*\n)*)", printed, re.MULTILINE))
    assert sections.keys() == {*LAUNCHES, "end"}
    for name, launches in LAUNCHES.items():
        calls = re.findall(r"^zesim\[\d+\] (ze\w+)", sections[name], re.MULTILINE)
        assert sum(call.startswith("zeCommandListAppendLaunchKernel") for call in calls) == launches, (name, calls)
        torchs = set() if name.startswith("replay") or name in ("block", "block in four") else ALLOCATES      # for results, and for a GEMM's counter
        assert set(calls) <= SUBMITS | torchs, (name, set(calls) - SUBMITS - torchs)
