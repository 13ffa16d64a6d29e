"""fused_moe as torch sees it: schema, fake tensors and torch.compile; and with the kernels that the device gets by default."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_xe
from moe_xe.ops.block.call import BLOCK, FUSIONS
from moe_xe.plan.gemm.heuristics import ISA_VARIABLE

from .case import HIDDEN, INTERMEDIATE, TOKENS, assert_right, call_of, check, make, make_shared, moved, reference

BF16, F32 = torch.bfloat16, torch.float32


def full_block(layout="enk", dtype=BF16):
    return make(dtype=dtype, bias=(F32, dtype), weight_layout=layout, weights_dtype=dtype, expert_map=torch.tensor([1, -1, 0, 5, 4, 3], dtype=torch.int32),
                shared=make_shared(INTERMEDIATE, weights=torch.rand(TOKENS), dtype=dtype))


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", ["enk", "ekn"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_default_kernels(layout, dtype, device, monkeypatch):
    """With the machine's own instructions."""
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    check(full_block(layout, dtype), device)


def op_arguments(block: dict, device) -> tuple:
    call = call_of({name: moved(value, device) for name, value in block.items()})
    return BLOCK.flatten(call) + FUSIONS.flatten(moe_xe.Fusions())


def test_opcheck(device):
    for block in (full_block(), make()):
        arguments = op_arguments(block, device)
        torch.library.opcheck(torch.ops.moe_xe.fused_moe, arguments)
        out = torch.empty(TOKENS, HIDDEN, dtype=block["hidden_states"].dtype, device=device)
        torch.library.opcheck(torch.ops.moe_xe.fused_moe_out, (*arguments, out, None))
        workspace = torch.zeros(2**20, dtype=torch.uint8, device=device)
        # the bytes that stay in a workspace depend on which work-group was first: no two runs compare equal
        torch.library.opcheck(torch.ops.moe_xe.fused_moe_out, (*arguments, out, workspace),
                              test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_compile_fullgraph(device):
    block = full_block()

    @torch.compile(fullgraph=True)
    def layer(x, scale, out=None):
        return moe_xe.fused_moe(x * scale, **others, out=out) + x

    x = block["hidden_states"].to(device)
    others = {name: moved(value, device) for name, value in block.items() if name != "hidden_states"}
    expected = reference(**block | dict(hidden_states=block["hidden_states"] * 0.5))
    assert_right(layer(x, 0.5) - x, expected)
    out = torch.full_like(x, float("nan"))
    layer(x, 0.5, out)
    assert_right(out, expected)


def test_compile_with_any_number_of_tokens(device):
    layer = torch.compile(moe_xe.fused_moe, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (31, 5):
        block = make(tokens)
        assert_right(layer(**{name: moved(value, device) for name, value in block.items()}), reference(**block))


@pytest.mark.parametrize("layout", ["enk", "ekn"])
def test_fake_xpu_tensors_reach_the_op(layout):
    """On a build of torch without XPU: checks, dispatch and the output's shape, dtype and device."""
    real = full_block(layout)
    with FakeTensorMode():
        fake = lambda value: torch.empty(value.shape, dtype=value.dtype, device="xpu") if isinstance(value, torch.Tensor) else value
        block = {name: fake(value) for name, value in real.items()}
        block["shared"] = moe_xe.SharedExpert(**{name: fake(value) for name, value in vars(real["shared"]).items()})
        out = torch.empty_strided((TOKENS, HIDDEN), (HIDDEN + 8, 1), dtype=BF16, device="xpu")
        results = moe_xe.fused_moe(**block), moe_xe.fused_moe(**block, out=out)
        workspace = torch.empty(2**20, dtype=torch.uint8, device="xpu")
        results += (moe_xe.fused_moe(**block, workspace=workspace),)
    for result in results:
        assert (result.shape, result.dtype, result.device.type) == ((TOKENS, HIDDEN), BF16, "xpu")
    assert results[1] is out


@pytest.mark.parametrize("with_out", [False, True])
def test_what_a_captured_graph_needs(with_out):
    """torch.compile(mode="reduce-overhead") captures graphs of one device, without tensors of the CPU, whose ops name what they write to."""
    with FakeTensorMode():
        block = {name: torch.empty(value.shape, dtype=value.dtype, device="xpu") if isinstance(value, torch.Tensor) else value
                 for name, value in make(dtype=BF16, weights_dtype=BF16).items()}
        out = torch.empty_like(block["hidden_states"]) if with_out else None
        x = block.pop("hidden_states")
        graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x, others, out: moe_xe.fused_moe(x, **others, out=out) + 1)(x, block, out).graph
    values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert len(values) > 5 and all(value.device.type == "xpu" for value in values)
    ops = [node.target for node in graph.nodes if getattr(node.target, "namespace", None) == "moe_xe"]
    assert ops == [torch.ops.moe_xe.fused_moe_out.default if with_out else torch.ops.moe_xe.fused_moe.default]
    written = {argument.name for argument in ops[0]._schema.arguments if argument.alias_info is not None}
    assert written == ({"out", "workspace"} if with_out else set())
    assert not {torch.Tag.cudagraph_unsafe, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(ops[0].tags)


def test_both_ops_have_an_xpu_kernel():
    for name in ("moe_xe::fused_moe", "moe_xe::fused_moe_out"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "XPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
