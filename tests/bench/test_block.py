"""The block benchmark: families, what counts as right, what is left out, memory and pictures."""
from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_xe import Fusions, timing
from moe_xe.bench import block, block_models, block_peers
from moe_xe.bench.block import check_memory, run_family
from moe_xe.bench.block_models import FAMILIES, make_inputs, make_weights, reference, scaled
from moe_xe.bench.memory import available_bytes, peak_bytes
from moe_xe.bench.plot import plot_blocks, require_matplotlib
from moe_xe.plan.formats import CHECKPOINTS, FORMATS
from moe_xe.plan.model.devices import DeviceRecord

transformers = pytest.importorskip("transformers", minversion="5.23")

CPU = torch.device("cpu")
RECORD = DeviceRecord("test", 2, {"bf16": 0.2, "f16": 0.1, "f32": 0.1}, 30.0, "made up")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A known roofline, and times of single calls."""
    monkeypatch.setattr(block, "record_for", lambda device: RECORD)
    monkeypatch.setattr(timing, "_BURST_SECONDS", 0)


def run(name, tokens=(5,), dtype="bf16", fusions=Fusions(), device=CPU):
    return list(run_family(name, 64, list(tokens), dtype, device, fusions, seconds=0))


# ------------------------------------------------------------------------------------------------------- the families

@pytest.mark.parametrize("name, config, experts, intermediate", [
    ("qwen3", "Qwen3MoeConfig", "num_experts", "moe_intermediate_size"),
    ("mixtral", "MixtralConfig", "num_local_experts", "intermediate_size"),
    ("deepseek", "DeepseekV3Config", "n_routed_experts", "moe_intermediate_size"),
    ("llama4", "Llama4TextConfig", "num_local_experts", "intermediate_size")])
def test_sizes_are_those_of_public_configurations(name, config, experts, intermediate):
    config, model = getattr(transformers, config)(), FAMILIES[name].model
    assert (model.hidden_size, model.intermediate_size, model.num_experts, model.top_k) == (
        config.hidden_size, getattr(config, intermediate), getattr(config, experts), config.num_experts_per_tok)


@pytest.mark.parametrize("name", FAMILIES)
@given(factor=st.floats(1, 1000))
def test_scaled_sizes_are_the_nearest_multiples_of_64(name, factor):
    family, small = FAMILIES[name], scaled(FAMILIES[name], factor)
    assert (small.model.num_experts, small.model.top_k) == (family.model.num_experts, family.model.top_k)
    for was, is_now in ((family.model.hidden_size, small.model.hidden_size),
                        (family.model.intermediate_size, small.model.intermediate_size),
                        (family.shared_intermediate_size, small.shared_intermediate_size)):
        assert is_now % 64 == 0 and (is_now > 0) == (was > 0)
        assert abs(is_now - was / factor) <= 32 or is_now == 64 and was / factor < 64


@pytest.mark.parametrize("name", FAMILIES)
def test_scale_1_changes_nothing(name):
    assert scaled(FAMILIES[name], 1) == FAMILIES[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_of_weights_operations_and_bytes(name):
    family = scaled(FAMILIES[name], 64)
    weights = make_weights(family, torch.bfloat16, CPU)
    shared = [w for w in vars(weights.shared).values() if w is not None] if weights.shared else []
    assert family.num_weights() == sum(w.numel() for w in (weights.w13, weights.w2, *shared))
    expert = weights.w13[0].numel() + weights.w2[0].numel()
    num_shared = sum(w.numel() for w in shared)
    assert family.flops(7) == 2 * 7 * (family.model.top_k * expert + num_shared)
    assert family.least_bytes(7, 3, 2) == 2 * (3 * expert + num_shared + 2 * 7 * family.model.hidden_size)


@pytest.mark.parametrize("name", FAMILIES)
def test_reference_does_not_depend_on_the_other_tokens(name):
    family = scaled(FAMILIES[name], 64)
    weights, inputs = make_weights(family, torch.float32, CPU), make_inputs(family, 9, torch.float32, CPU)
    every = reference(family, weights, inputs, torch.arange(9))
    assert every.dtype == torch.float64
    two = reference(family, weights, inputs, torch.tensor([4, 7]))
    torch.testing.assert_close(two, every[[4, 7]], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- the cases

@pytest.mark.few(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name in ("qwen3", "llama4"))) for name in FAMILIES])
def test_every_family_agrees_with_its_peers_and_the_reference(name, device):
    small, result = run(name, tokens=(1, 37), device=device)
    model = scaled(FAMILIES[name], 64).model
    assert result.correct and small.correct
    assert (result.hidden_size, result.intermediate_size, result.num_experts, result.top_k) == dataclasses.astuple(model)[1:]
    assert (small.tokens, result.tokens, result.rows, small.active_experts) == (1, 37, 37 * model.top_k, model.top_k)
    peers = {name: getattr(result, f"{name}_ms") for name in block_peers.PEERS}
    assert all(ms > 0 for ms in peers.values()) and result.not_run == {}
    assert peers[result.fastest_peer] == min(peers.values())
    assert result.speedup == pytest.approx(min(peers.values()) / result.moe_xe_ms)
    assert result.gflops == pytest.approx(scaled(FAMILIES[name], 64).flops(37) / result.moe_xe_ms / 1e6)
    assert 0 < result.roofline == pytest.approx(max(result.gflops / 200, result.gbytes_per_s / 30))
    out_bytes = 37 * model.hidden_size * 2
    assert min(result.moe_xe_peak_bytes, result.fastest_peer_peak_bytes) >= out_bytes
    assert json.loads(json.dumps(result.as_dict()))["correct"]


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("fp32", marks=pytest.mark.full)])
def test_other_dtypes(dtype, device):
    (result,) = run("gpt-oss", dtype=dtype, device=device)
    assert result.correct and result.dtype == dtype


@pytest.mark.parametrize("gather, scatter", [(True, False), pytest.param(False, False, marks=pytest.mark.full), (False, True)])
def test_fusions_are_handed_on_and_reported(gather, scatter, monkeypatch):
    seen, fused = [], block_models.fused_moe

    def fused_moe(*args, fusions, **kwargs):
        seen.append(fusions)
        return fused(*args, fusions=fusions, **kwargs)

    monkeypatch.setattr(block_models, "fused_moe", fused_moe)
    (result,) = run("mixtral", fusions=Fusions(gather=gather, scatter=scatter))
    assert set(seen) == {Fusions(gather=gather, scatter=scatter)}
    assert (result.permute_x, result.permute_y, result.correct) == (gather, scatter, True)


@pytest.mark.parametrize("spoil", [
    lambda out: out.index_fill(0, torch.tensor([len(out) - 1]), 0), lambda out: out * 1.02,
    lambda out: out.index_fill(1, torch.tensor([3]), float("nan")), lambda out: out.roll(1, 0)],
    ids=["last token", "scale", "nan", "order"])
def test_wrong_outputs_are_found(spoil, monkeypatch):
    fused = block_models.run_fused
    monkeypatch.setattr(block_models, "run_fused", lambda *args: spoil(fused(*args)))
    (result,) = run("mixtral", tokens=(7,))
    assert result.wrong == ["moe_xe"] and not result.correct


def test_a_wrong_peer_is_found(monkeypatch):
    make = block_peers.make_peer
    monkeypatch.setattr(block_peers, "make_peer", lambda name, *args: (
        (lambda: make(name, *args)() * 1.5) if name == "grouped_mm" else make(name, *args)))
    (result,) = run("mixtral")
    assert result.wrong == ["grouped_mm"]


def test_what_does_not_fit_or_does_not_run_is_named(monkeypatch):
    def make(name, *args):
        if name == "grouped_mm":
            return lambda: torch.empty(2, 3) @ torch.empty(2, 3)
        return block_peers_make(name, *args)

    block_peers_make = block_peers.make_peer
    monkeypatch.setattr(block_peers, "make_peer", make)
    monkeypatch.setattr(block, "available_bytes", lambda device: 1000)
    (result,) = run("mixtral")
    assert result.batched_mm_ms is None and result.grouped_mm_ms is None and result.eager_ms > 0
    assert "GB" in result.not_run["batched_mm"] and "shapes" in result.not_run["grouped_mm"]
    assert result.fastest_peer == "eager" and result.correct


def test_temporaries_of_the_peers_that_need_more():
    family = scaled(FAMILIES["llama4"], 64)
    weights, inputs = make_weights(family, torch.bfloat16, CPU), make_inputs(family, 64, torch.bfloat16, CPU)
    for name in ("eager", "batched_mm"):
        with torch.inference_mode():
            peak = peak_bytes(block_peers.make_peer(name, family, weights, inputs), CPU)
        assert block_peers.temporary_bytes(name, family, 64, 2) == pytest.approx(peak, rel=0.35)
    assert block_peers.temporary_bytes("grouped_mm", family, 64, 2) == 0


# ------------------------------------------------------------------------------------------------------------- memory

def test_too_little_memory_is_said_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(block, "available_bytes", lambda device: 5 << 30)
    with pytest.raises(MemoryError, match=r"deepseek with 64 tokens needs about 2\d\.\d GB at scale 1.*--scale 4 would fit"):
        check_memory("deepseek", 1, 64, torch.bfloat16, CPU)
    check_memory("deepseek", 4, 64, torch.bfloat16, CPU)
    with pytest.raises(MemoryError, match="too many tokens"):
        check_memory("qwen3", 1, 1 << 40, torch.bfloat16, CPU)


def test_available_memory_is_plausible(device):
    assert 0 < available_bytes(device) < 1 << 45


def test_peak_memory_is_the_most_held_at_a_time(device):
    def call():
        x = torch.empty(1 << 20, dtype=torch.uint8, device=device)
        y = torch.empty(2 << 20, dtype=torch.uint8, device=device)
        del x
        z = torch.empty(1 << 19, dtype=torch.uint8, device=device)
        return y, z

    assert peak_bytes(call, device) == 3 << 20


def test_peak_memory_sees_what_an_op_allocates():
    family = scaled(FAMILIES["mixtral"], 64)
    weights, inputs = make_weights(family, torch.bfloat16, CPU), make_inputs(family, 50, torch.bfloat16, CPU)
    peak = peak_bytes(lambda: block_models.run_fused(family, weights, inputs, Fusions()), CPU)
    rows, out = 100 * family.model.intermediate_size * 2, 50 * family.model.hidden_size * 2
    assert peak >= rows + out


# ----------------------------------------------------------------------------------------------------------- pictures

def test_plot_is_a_png_of_each_case(tmp_path):
    pytest.importorskip("matplotlib")
    (result,) = run("mixtral")
    results = [dataclasses.replace(result, tokens=tokens, moe_xe_ms=float(tokens), roofline=share, batched_mm_ms=None)
               for tokens, share in ((64, 0.5), (1, 0.1), (8, None))]
    results += [dataclasses.replace(result, dtype="fp32", roofline=None)]
    path = tmp_path / "picture"
    plot_blocks(results, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="matplotlib.*pip install"):
        require_matplotlib()


def test_transformers_is_asked_for(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.22.1")    # it replaces itself
    with pytest.raises(ImportError, match="transformers >= 5.23.*5.22.1"):
        block_peers.require_transformers()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="not installed"):
        block_peers.require_transformers()


# ---------------------------------------------------------------------------------------------------- quantised weights

@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["gpt-oss", "deepseek"])
@pytest.mark.parametrize("weights", CHECKPOINTS)
def test_quantised_weights_beside_their_dense_numbers(name, weights):
    (result,) = run_family(name, 64, [5], "bf16", CPU, Fusions(), seconds=0, weights_name=weights)
    assert result.correct and result.weights == weights and result.moe_xe_dense_ms > 0
    family, bits = scaled(FAMILIES[name], 64), FORMATS[CHECKPOINTS[weights].format].codes.bits
    counted = result.gbytes_per_s * result.moe_xe_ms * 1e6
    assert family.least_bytes(5, result.active_experts, 2, bits / 8) <= counted < family.least_bytes(5, result.active_experts, 2)


def test_wrong_quantised_outputs_are_found(monkeypatch):
    fused = block_models.run_fused

    def spoiled(family, weights, *arguments):
        out = fused(family, weights, *arguments)
        return out if isinstance(weights.w13, torch.Tensor) else out * 1.1

    monkeypatch.setattr(block_models, "run_fused", spoiled)
    (result,) = run_family("gpt-oss", 64, [5], "bf16", CPU, Fusions(), seconds=0, weights_name="mxfp4")
    assert result.wrong == ["moe_xe"]


# ----------------------------------------------------------------------------------------------------------- training

def run_training(name, mode, tokens=23, dtype="fp32"):
    (result,) = run_family(name, 64, [tokens], dtype, CPU, Fusions(gather=False), seconds=0, mode=mode)
    return result


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ["backward", "both"])
@pytest.mark.parametrize("name", ["gpt-oss", *(pytest.param(name, marks=pytest.mark.full) for name in ("mixtral", "llama4"))])
def test_gradients_agree_with_peers_and_the_reference(name, mode):
    result = run_training(name, mode)
    assert result.correct and (result.mode, result.permute_x, result.permute_y) == (mode, True, True)
    assert all(getattr(result, f"{peer}_ms") > 0 for peer in block_peers.PEERS if peer not in result.not_run)
    forward = scaled(FAMILIES[name], 64).flops(23)
    assert result.gflops == pytest.approx({"backward": 2, "both": 3}[mode] * forward / result.moe_xe_ms / 1e6)
    weights = scaled(FAMILIES[name], 64).num_weights() * 4
    assert min(result.moe_xe_peak_bytes, result.fastest_peer_peak_bytes) > weights     # their gradient


@pytest.mark.few(3)
@pytest.mark.parametrize("spoiled", ["hidden_states", "topk_weights", "w13", "w2", "b13", "b2"])
def test_wrong_gradients_are_found(spoiled, monkeypatch):
    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.01

    fused = block_models.fused_moe

    def wrong(x, w13, w2, factors, ids, b13, b2, **options):
        given = dict(hidden_states=x, w13=w13, w2=w2, topk_weights=factors, b13=b13, b2=b2)
        given[spoiled] = Spoil.apply(given[spoiled])
        return fused(topk_ids=ids, **given, **options)

    monkeypatch.setattr(block_models, "fused_moe", wrong)
    assert run_training("gpt-oss", "backward").wrong == ["moe_xe"]


def test_backward_leaves_the_forward_pass_out(monkeypatch):
    passes, fused = [], block_models.fused_moe
    monkeypatch.setattr(block_models, "fused_moe", lambda *args, **options: passes.append(1) or fused(*args, **options))
    run_training("gpt-oss", "backward")
    assert len(passes) == 1
    run_training("gpt-oss", "both")
    assert len(passes) > 5


def test_training_needs_more_memory(monkeypatch):
    monkeypatch.setattr(block, "available_bytes", lambda device: 5 << 30)
    check_memory("deepseek", 4, 64, torch.bfloat16, CPU)
    with pytest.raises(MemoryError, match="--scale 8 would fit|--scale 16 would fit"):
        check_memory("deepseek", 4, 64, torch.bfloat16, CPU, training=True)
