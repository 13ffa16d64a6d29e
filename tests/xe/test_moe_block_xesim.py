"""The block in one launch as BMG code, executed by xesim with few and many work-groups in several interleavings; tests/ops/block
compares it with four launches, on a simulated card too."""
from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from moe_xe import QuantizedWeight
from moe_xe.isa import kernels, ocloc, spirv
from moe_xe.isa.listing import summarize
from moe_xe.jit.block_source import KERNEL_NAME, KERNEL_SIGNATURE, block_source
from moe_xe.jit.kernel_source import KernelSource
from moe_xe.jit.shipped_sources import sources_dir
from moe_xe.ops.block import one_launch
from moe_xe.ops.block.call import BLOCK, Fusions
from moe_xe.ops.block.stages import Workspace, _Stages, merged_shared
from moe_xe.ops.checks import TORCH_DTYPES
from moe_xe.ops.routing.token_sort import Routing
from moe_xe.plan.block.one_launch import OneLaunch, plan_one_launch
from moe_xe.plan.block.token_sort import CombineProblem, SortProblem, aligned_columns
from moe_xe.plan.gemm.config import Schedule, XeConfig
from moe_xe.plan.formats import CHECKPOINTS, FORMATS, Quantization
from moe_xe.plan.gemm.heuristics import Family, generic_config
from moe_xe.plan.launch import LaunchPlan, Target
from moe_xe.plan.model.devices import record_named
from moe_xe.plan.override import force_config
from moe_xe.plan.problem import Activation, ActivationKind, Dtype, GroupedGemmProblem, RowScale, WeightLayout

from ..ops.block.case import assert_right, call_of, make, make_shared, reference
from .case import missing

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
B580 = Target(is_cpu=False, cores=20, has_dpas=True, record=record_named("b580"))
HIDDEN, INTERMEDIATE = 200, 136     # tails of every step and tile


@cache
def build(source: KernelSource, grf_option: str, device: str = "bmg"):
    root = sources_dir()
    return ocloc.build(spirv.compile_to_spirv(source.text, [f"-I{root / 'include'}", f"-I{root}"]), device, grf_option)


def grf_option(block: OneLaunch) -> str:
    return kernels.GRF_OPTION.format(block.gate_up.config.grf_size) if block.gate_up.family is Family.xe else ""


class Block:
    """One call's tensors, all of which the simulator has as buffers with nothing around them."""

    def __init__(self, arguments: dict):
        self.call = call = call_of(arguments)
        tokens, experts = len(call.hidden_states), call.w13.shape[0]
        shared = merged_shared(call, Fusions())
        weights = None if call.shared is None or call.shared.weights is None else call.shared.weights.view(tokens, 1).repeat(1, shared)
        self.routing = Routing(call.topk_ids, experts, call.expert_map, shared, call.topk_weights, weights, call.routed_scaling_factor)
        poison = lambda *shape, dtype: torch.full((torch.Size(shape).numel() * dtype.itemsize,), 0xFF, dtype=torch.uint8).view(dtype).view(shape)
        space = Workspace(None, None)
        space.take = poison
        pairs = self.routing.num_pairs
        rows = poison(shared + experts, dtype=torch.int32), poison(pairs, dtype=torch.int32), poison(pairs, dtype=F32)
        self.gemms = _Stages(None, call, Fusions(), space, self.routing).gemms(*rows, shared)
        self.out = poison(tokens, call.w13.shape[2], dtype=call.hidden_states.dtype)
        columns = aligned_columns(self.out.shape[1], call.y_dtype)
        self.y = self.out if self.routing.slots == 1 else poison(pairs, columns, dtype=TORCH_DTYPES[call.y_dtype])
        self.board = torch.zeros(OneLaunch.board_words(len(rows[0])), dtype=torch.int32)
        self.tensors = [*BLOCK.tensors(call).values(), *rows, self.gemms[1].a, self.y, self.out, self.board, weights]
        self.plan = one_launch.plan_block(B580, self.routing, *self.gemms, self.y, self.out)

    def launch(self, num_groups: int, seed: int) -> torch.Tensor:
        from xesim import Kernel, Memory
        block, *operands = self.plan
        plan = (replace(block, gate_up=replace(block.gate_up, num_groups=num_groups), down=replace(block.down, num_groups=num_groups)), *operands)
        scratch = torch.full((one_launch.scratch_bytes(plan),), 0xFF, dtype=torch.uint8)
        memory, buffers = Memory(), {}
        for tensor in [*self.tensors, scratch]:
            if tensor is not None:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                buffers[whole.data_ptr()] = (len(whole), memory.map(whole.numpy()))

        def simulated(address: int | None):
            if address is None:
                return None
            begin = max(start for start in buffers if start <= address)
            assert address - begin < buffers[begin][0]
            return buffers[begin][1] + address - begin

        number = {"p": simulated, "q": np.int64, "i": np.int32, "f": np.float32}
        values = one_launch.arguments(plan, self.routing, *self.gemms, self.out, self.board, scratch)
        stats = Kernel(build(block_source(block), grf_option(block)), KERNEL_NAME).launch(
            num_groups * block.group_size, block.group_size, [number[letter](value) for letter, value in zip(KERNEL_SIGNATURE, values, strict=True)],
            seed=seed, mem=memory, quantum=(50, 200, 1000)[seed % 3])
        assert not stats.warnings, stats.warnings
        return self.out


def check(arguments: dict, family: Family = Family.xe, groups=(1, 7, 40)) -> None:
    """Right, and bitwise equal whatever the number of work-groups."""
    results = []
    for seed, num_groups in enumerate(groups):
        block = Block(arguments)
        assert block.plan[0].gate_up.family is family
        results.append(block.launch(num_groups, seed))
    assert_right(results[0], reference(**arguments))
    assert all(torch.equal(result.view(torch.uint8), results[0].view(torch.uint8)) for result in results)


def arguments(tokens: int, experts: int, top_k: int = 3, dtype=BF16, **options) -> dict:
    return make(tokens, experts, top_k, HIDDEN, INTERMEDIATE, dtype, **options)


@pytest.mark.parametrize("layout", ["enk", "ekn"])
@pytest.mark.parametrize("tokens, experts", [(40, 3), (9, 40), pytest.param(1, 5, marks=pytest.mark.full)])
def test_few_tokens(tokens, experts, layout):
    check(arguments(tokens, experts, weight_layout=layout, bias=(F32, BF16)))


@pytest.mark.full
def test_many_experts_and_tokens_without_any():
    check(arguments(5, 512, 7), groups=(7,))
    block = arguments(12, 512, 7)
    block["topk_ids"].fill_(-1)
    check(block, groups=(3,))


ONE_SLOT = dict(top_k=1, ids_dtype=torch.int64, weights_dtype=BF16)
ON_INPUT = dict(activation="swiglu_oai", interleaved=True, limit=0.7, weight_on_input=True)


@pytest.mark.parametrize("options", [ONE_SLOT | ON_INPUT, *(pytest.param(options, marks=pytest.mark.full) for options in (ONE_SLOT, ON_INPUT))],
                         ids=["all", "one slot", "on input"])
def test_options(options):
    check(arguments(17, 6, **options))


def test_shared_experts():
    size = 160      # a part of down_proj begins at a multiple of 64 bytes
    shared = make_shared(2 * size, weights=torch.rand(6), hidden=HIDDEN, dtype=BF16)
    check(make(6, 4, 3, HIDDEN, size, BF16, shared=shared))


@pytest.mark.parametrize("layout", ["enk", pytest.param("ekn", marks=pytest.mark.full)])
def test_k_in_parts(layout):
    """An expert's first GEMM is done when the last part of its last tile is."""
    config = XeConfig((16,), 256, 2, 7, Schedule.dynamic, (16,), (32,), prefetch_distance=3, splits=2)
    with force_config(config):
        check(make(3, 4, 2, 520, 512, BF16, weight_layout=layout, bias=(F32, BF16)))


@pytest.mark.parametrize("format, dtype", [
    ("mxfp4", BF16), pytest.param("int4", F16, marks=pytest.mark.full), pytest.param("fp8_e4m3", BF16, marks=pytest.mark.full)])
def test_quantised_weights(format, dtype):
    block, group = make(5, 4, 3, 256, 160, dtype), FORMATS[format].group or (1, 32)
    check(block | {name: QuantizedWeight.quantize(block[name].float(), format, group) for name in ("w13", "w2")}, groups=(1, 7))


def test_the_generic_family():
    check(make(5, 4, 3, 50, 37), Family.generic)


def plan_of(layout: WeightLayout, tokens: int, *, generic: bool = False, hidden: int = 2048, size: int = 768, experts: int = 128, top_k: int = 8,
            activation: Activation = Activation(), bias: Dtype | None = None, shared: int = 0,
            quantization: Quantization | None = None) -> OneLaunch:
    """Of a model's block, as it is launched by default."""
    first = GroupedGemmProblem(2 * size, hidden, Dtype.bf16, Dtype.bf16, layout, gathered=True, slots=top_k + shared, activation=activation,
                               bias=bias, shared=shared, quantization=quantization)
    second = GroupedGemmProblem(hidden, size, Dtype.bf16, Dtype.f32, layout, scattered=True, row_scale=RowScale.outputs, bias=bias,
                                shared=shared, quantization=quantization)
    rows = tokens * (top_k + shared)
    plans = []
    for problem in (first, second):
        config = generic_config(problem, rows) if generic else kernels.default_config(problem, rows, experts)
        plans.append(LaunchPlan(problem, config, Family.generic if generic else Family.xe, 20, config.work_group_size, 0))
    return plan_one_launch(*plans, SortProblem(top_k, shared, weights=Dtype.f32), CombineProblem(hidden, Dtype.f32, Dtype.bf16, top_k, shared, columns=4),
                           tokens, experts + shared)


OAI = Activation(ActivationKind.swiglu_oai, interleaved=True, alpha=1.702, limit=7.0)
GPT_OSS = dict(hidden=2880, size=2880, experts=32, top_k=4, activation=OAI, bias=Dtype.bf16)
MXFP4, FP8 = dict(GPT_OSS, quantization=CHECKPOINTS["mxfp4"].quantization), dict(quantization=CHECKPOINTS["fp8"].quantization)


# Its two main loops need 256 bytes more than PVC's registers.
KNOWN = (WeightLayout.ekn, 64, GPT_OSS, "pvc")
SPILLS = [pytest.mark.xfail(strict=True, reason="256 bytes of spills")]


@pytest.mark.parametrize("layout, tokens, options, device", [
    (WeightLayout.enk, 1, GPT_OSS, "pvc"), (WeightLayout.enk, 1, MXFP4, "bmg"),
    *(pytest.param(WeightLayout.enk, tokens, options, device, marks=pytest.mark.full) for tokens in (1, 64) for options in (MXFP4, FP8)
      for device in ("bmg", "pvc", "lnl-m", "ptl-h") if (tokens, options, device) != (1, MXFP4, "bmg")),
    *(pytest.param(layout, tokens, options, device, marks=[pytest.mark.full, *SPILLS * ((layout, tokens, options, device) == KNOWN)]) for layout in WeightLayout for tokens in (1, 64)
      for options in ({}, GPT_OSS, dict(shared=1), dict(generic=True)) for device in ("bmg", "pvc", "lnl-m", "ptl-h"))],
    ids=lambda value: value if isinstance(value, str) else str(value))
def test_no_spills(layout, tokens, options, device):
    block = plan_of(layout, tokens, **options)
    summary = summarize(build(block_source(block), grf_option(block), device), KERNEL_NAME)
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())
