"""autotune=True: what is measured, when, and that results are those of untuned calls."""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import moe_xe
from moe_xe import LoraAdapter, fused_moe, grouped_gemm, grouped_mm, grouped_outer, lora_moe, timing
from moe_xe.ops.gemm import grouped_outer as outer_module
from moe_xe.ops import launch, tuned
from moe_xe.ops.gemm.grouped_gemm import INPUTS, Inputs
from moe_xe.plan.choice.choice import Choice
from moe_xe.plan.override import force_config
from moe_xe.plan.trials import trial_configs
from moe_xe.tuning import default_store, default_tuner
from moe_xe.tuning.store import Entry

from .block.case import HIDDEN, INTERMEDIATE, make, make_shared, moved
from .tiles import ISA, K, N, tile

pytestmark = pytest.mark.cpu_device

COUNTS = [5, 0, 40, 1]
E, ROWS = len(COUNTS), sum(COUNTS)
FASTER = dict(raster_group=2)        # the kernel differs, but not what it computes


@pytest.fixture(autouse=True)
def one_trial(fresh_tuner, monkeypatch):
    """Beside the default, so that little is compiled; by single calls. Returns the problems measured."""
    problems = []

    def one_config(plan, operands, tokens_per_expert, target):
        problems.append(str(plan.problem))
        change = FASTER if hasattr(plan.config, "raster_group") else dict(tile_rows=plan.config.tile_rows // 2)
        return [replace(plan.config, **change)]

    monkeypatch.setattr(tuned, "trial_configs", one_config)
    monkeypatch.setattr(timing, "_BURST_SECONDS", 0)
    return problems


@pytest.fixture
def runs(monkeypatch):
    """How often a kernel was submitted: a list that grows."""
    submitted = []
    for module, name in ((launch, "_submit"), (outer_module, "submit")):
        def counting(*arguments, _submit=getattr(module, name)):
            submitted.append(1)
            return _submit(*arguments)
        monkeypatch.setattr(module, name, counting)
    return submitted


def operands(device, requires_grad=False):
    a, w = torch.randn(ROWS, K, device=device), torch.randn(E, N, K, device=device)
    return a.requires_grad_(requires_grad), w.requires_grad_(requires_grad), torch.tensor(COUNTS, dtype=torch.int32, device=device)


def close(got, want):
    got, want = got.detach().double(), want.detach().double()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.square().mean().sqrt()))


def test_results_and_that_the_second_call_does_not_measure(device, runs, one_trial, launched):
    a, w, rows = operands(device)
    out = torch.full((ROWS, N), float("nan"), device=device)
    grouped_gemm(a, w, rows, out=out, autotune=True)
    assert len(runs) > 2 and one_trial == [f"f32 N={N} K={K} enk"]
    assert torch.equal(out, grouped_gemm(a, w, rows))
    runs.clear()
    assert torch.equal(grouped_gemm(a, w, rows, autotune=True), out)
    assert len(runs) == 1 == len(one_trial)
    assert [line.origin for line in launched()] == ["tuned", "chosen", "tuned"]


def test_choices_on_disk_are_not_measured_again(device, runs, one_trial, tmp_path, monkeypatch):
    a, w, rows = operands(device)
    grouped_gemm(a, w, rows, autotune=True)
    runs.clear()
    default_tuner.cache_clear()     # as a new process
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path))
    grouped_gemm(a, w, rows, autotune=True)
    assert len(runs) == 1 == len(one_trial)


@pytest.mark.parametrize("broken", [{"unpacked_rows": 60000}, {"threads": 65536, "heights": (65536,)}], ids=["stack", "scratch"])
def test_a_choice_on_disk_that_breaks_a_rule_is_measured_again(runs, one_trial, tmp_path, monkeypatch, broken):
    """An imported file may say anything that its classes take, and no call may fail for it."""
    a, w, rows = operands("cpu")
    grouped_gemm(a, w, rows, autotune=True)
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path))
    store = default_store()
    (key, entry), = store.entries()
    broken = replace(entry.config, **broken)
    store.store(key, Entry(broken, broken, {broken: 1.0}))
    store.export_to(tmp_path / "file.json")
    assert store.clear() == store.import_from(tmp_path / "file.json") == 1
    default_tuner.cache_clear()     # as a new process
    grouped_gemm(a, w, rows, autotune=True)
    (_, mended), = store.entries()
    assert len(one_trial) == 2 and mended.config != broken


def test_the_tuners_choice_is_used(device, monkeypatch, launched, fresh_tuner):
    a, w, rows = operands(device)
    monkeypatch.setattr(fresh_tuner, "config_for", lambda key, default, *rest: replace(default, tile_width=98))
    grouped_gemm(a, w, rows, autotune=True)
    line, = launched()
    assert " x 98," in line.config and line.origin == "tuned"
    with force_config(tile(66)):
        grouped_gemm(a, w, rows, autotune=True)
    assert launched()[0].origin == "forced"


def test_what_is_added_to_is_added_to_once(device, runs):
    right, _, rows = operands(device)
    left = torch.randn(ROWS, N, device=device)
    before = torch.randn(E, N, 2 * K, device=device)
    out = before.clone()
    grouped_outer(left, right, rows, out=out[..., :K], accumulate=True, autotune=True)
    assert len(runs) > 2
    close(out[..., :K], grouped_outer(left, right, rows) + before[..., :K])
    assert torch.equal(out[..., K:], before[..., K:])


def test_rows_beyond_the_counts_stay_as_they_are(device):
    a, w, rows = operands(device)
    out = torch.full((ROWS, N), 7.0, device=device)
    grouped_gemm(a, w, rows - torch.tensor([0, 0, 10, 1], dtype=torch.int32, device=device), out=out, autotune=True)
    assert (out[-11:] == 7).all() and not (out[:-11] == 7).any()


@pytest.mark.few(2)
@pytest.mark.parametrize("form", ["2D x 3D", pytest.param("2D x 2D", marks=pytest.mark.full), "3D x 2D", "3D x 3D"])
def test_grouped_mm(form, device, one_trial, launched):
    shapes = {"2D x 3D": ((ROWS, K), (E, K, N)), "2D x 2D": ((N, ROWS), (ROWS, K)), "3D x 2D": ((E, N, K), (K, ROWS)),
              "3D x 3D": ((E, 9, K), (E, K, N))}[form]
    a, b = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    offs = None if form == "3D x 3D" else torch.tensor(COUNTS, device=device).cumsum(0).int()
    out, plain = grouped_mm(a, b, offs=offs, autotune=True), grouped_mm(a, b, offs=offs)
    close(out, plain)
    gradient = torch.randn_like(out)
    launched()
    got = torch.autograd.grad(out, (a, b), gradient)
    assert [line.origin for line in launched()] == ["tuned", "tuned"] and len(one_trial) == 3
    for mine, other in zip(got, torch.autograd.grad(plain, (a, b), gradient)):
        close(mine, other)


def test_gradients_of_grouped_gemm(device, one_trial):
    a, w, rows = operands(device, True)
    gradient = torch.randn(ROWS, N, device=device)
    tuned_gradients, plain = (torch.autograd.grad(grouped_gemm(a, w, rows, autotune=autotune), (a, w), gradient)
                              for autotune in (True, False))
    assert len(one_trial) == 3 and sum("P=" in problem for problem in one_trial) == 1
    for mine, other in zip(tuned_gradients, plain):
        close(mine, other)


def block(device, **options) -> dict:
    arguments = make(**options)
    arguments["topk_ids"] %= 6
    return {name: moved(value, device) for name, value in arguments.items()}


@pytest.mark.few(1)
@pytest.mark.parametrize("shared", [None, INTERMEDIATE, INTERMEDIATE + 4], ids=["routed", "shared, merged", "shared, apart"])
def test_fused_moe_tunes_each_gemm(shared, device, one_trial, runs):
    arguments = block(device, **({} if shared is None else {"shared": make_shared(shared)}))
    tuned_out = fused_moe(**arguments, autotune=True)
    assert len(one_trial) == (4 if shared == INTERMEDIATE + 4 else 2)
    assert torch.equal(tuned_out, fused_moe(**arguments))
    runs.clear()
    assert torch.equal(tuned_out, fused_moe(**arguments, autotune=True)) and len(runs) == len(one_trial)


@pytest.mark.few(1)
@pytest.mark.parametrize("function, num_gemms", [(fused_moe, 7), (lora_moe, 12)], ids=["fused_moe", "lora_moe"])
def test_training_tunes_each_gemm(function, num_gemms, device, one_trial, launched):
    """Six, of fused_moe's first one also without its activation; six more of an adapter."""
    arguments = block(device)
    if function is lora_moe:
        adapter = (torch.randn(6, 8, HIDDEN, device=device), torch.randn(6, 2 * INTERMEDIATE, 8, device=device))
        arguments["lora13"] = LoraAdapter(*(part.requires_grad_() for part in adapter))
    leaves = [arguments[name].requires_grad_() for name in ("hidden_states", "w13", "w2", "topk_weights")]
    leaves += [] if function is fused_moe else adapter
    results = []
    for autotune in (True, False):
        out = function(**arguments, autotune=autotune)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        assert {line.origin for line in launched()} == {"tuned" if autotune else "chosen"}
    assert len(one_trial) == len(set(one_trial)) == num_gemms
    for mine, other in zip(*results):
        close(mine, other)


def test_nothing_is_measured_in_a_capture(device, monkeypatch, runs, one_trial):
    a, w, rows = operands(device)
    monkeypatch.setattr(tuned, "is_capturing", lambda device: True)
    assert torch.equal(grouped_gemm(a, w, rows, autotune=True), grouped_gemm(a, w, rows))
    assert len(runs) == 2 and not one_trial


def test_threads_measure_once(device, one_trial):
    a, w, rows = operands(device)
    expected = grouped_gemm(a, w, rows)
    with ThreadPoolExecutor(2) as pool:
        for out in pool.map(lambda _: grouped_gemm(a, w, rows, autotune=True), range(4)):
            assert torch.equal(out, expected)
    assert len(one_trial) == 1


def test_on_a_queue_of_ones_own(one_trial):
    dpctl = pytest.importorskip("dpctl")
    a, w, rows = operands("cpu")
    with moe_xe.on_queue(dpctl.SyclQueue("cpu", property="in_order")):
        out = grouped_gemm(a, w, rows, autotune=True)
    assert torch.equal(out, grouped_gemm(a, w, rows)) and len(one_trial) == 1


def test_nothing_to_compute(device, one_trial):
    empty = torch.zeros(E, dtype=torch.int32, device=device)
    a, w, _ = operands(device)
    assert grouped_gemm(a[:0], w, empty, autotune=True).shape == (0, N)
    assert not grouped_outer(a[:0], a[:0], empty, autotune=True).any()
    assert fused_moe(**block(device, tokens=0), autotune=True).shape == (0, HIDDEN)
    assert not one_trial
    out = torch.full((ROWS, N), 7.0, device=device)      # rows, but no expert has them
    assert (grouped_gemm(a, w, empty, out=out, autotune=True) == 7).all()


@pytest.mark.parametrize("rows_format", ["counts", pytest.param("ends", marks=pytest.mark.full)])
def test_opcheck(rows_format, device):
    a, w, rows = operands(device)
    rows = rows if rows_format == "counts" else rows.cumsum(0).int()
    arguments = INPUTS.flatten(Inputs(a, w, rows))
    torch.library.opcheck(torch.ops.moe_xe.grouped_gemm, (*arguments, torch.float32, rows_format, "dynamic", "autotune", False))
    torch.library.opcheck(torch.ops.moe_xe.grouped_outer, (torch.randn(ROWS, N, device=device), a, rows, None, None, 1, rows_format, "autotune",
                                                           torch.float32))
    with pytest.raises(ValueError, match="a configuration must be JSON"):
        torch.ops.moe_xe.grouped_gemm(*arguments, torch.float32, rows_format, "dynamic", "tuned", False)
    with pytest.raises(ValueError, match="isa must be one of"):
        torch.ops.moe_xe.grouped_gemm(*arguments, torch.float32, rows_format, "dynamic", Choice(tile(98)).text.replace(ISA, "avx9"), False)


def test_compiles_to_one_graph(device, launched):
    a, w, rows = operands(device, True)
    arguments = block(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(a, w, x):
        y = grouped_gemm(a, w, rows, autotune=True)
        return y.sum() + grouped_outer(y, a, rows, autotune=True).sum() + fused_moe(**(arguments | dict(hidden_states=x)), autotune=True).sum()

    step(a, w, arguments["hidden_states"]).backward()
    assert {line.origin for line in launched()} == {"tuned"}
    close(a.grad, torch.autograd.grad(grouped_gemm(a, w, rows).sum() + grouped_outer(grouped_gemm(a, w, rows), a, rows).sum(), a)[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("op", [grouped_gemm, pytest.param(grouped_outer, marks=pytest.mark.full)])
def test_what_is_proposed_is_measured_without_a_warning(op, device, monkeypatch):
    monkeypatch.setattr(tuned, "trial_configs", trial_configs)
    a, w, rows = operands(device)
    arguments = (a, w, rows) if op is grouped_gemm else (torch.randn(ROWS, N, device=device), a, rows)
    close(op(*arguments, autotune=True), op(*arguments))
