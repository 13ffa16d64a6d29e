"""Configurations given by hand, on the CPU device: each GEMM is launched in its own, and computes what it should."""
from dataclasses import replace

import pytest
import torch

import moe_xe
from moe_xe import Fusions, GemmConfigs, LoraAdapter, MoeConfig, fused_moe, grouped_gemm, grouped_mm, grouped_outer, lora_moe
from moe_xe.ops.gemm.grouped_gemm import INPUTS, Inputs
from moe_xe.plan.choice.choice import Choice
from moe_xe.plan.gemm.config import GenericConfig, Schedule
from moe_xe.plan.override import force_config
from moe_xe.runtime import Queue

from .block.case import HIDDEN, INTERMEDIATE, assert_right, make, make_shared, moved, reference as reference_moe
from .tiles import K, N, outer_tile, tile

pytestmark = pytest.mark.cpu_device

COUNTS = [5, 0, 40, 1]
E, ROWS = len(COUNTS), sum(COUNTS)
CPU = torch.device("cpu")
GEMM = GemmConfigs(tile(98), tile(66), outer_tile(50))


def operands(requires_grad=False):
    a, w = torch.randn(ROWS, K, requires_grad=requires_grad), torch.randn(E, N, K, requires_grad=requires_grad)
    return a, w, torch.tensor(COUNTS, dtype=torch.int32)


def reference(a, w):
    return torch.cat([part @ each.T for part, each in zip(a.double().split(COUNTS), w.double())])


def assert_near(got, want):
    got, want = got.detach().double(), want.detach().double()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.square().mean().sqrt()))


def of(lines) -> list[tuple]:
    """Which op, in tiles of which width, by whose choice."""
    return [(line.op, int(line.config.split(" x ")[1].split(",")[0]), line.origin) for line in lines]


def test_grouped_gemm(launched):
    a, w, rows = operands()
    out = torch.full((ROWS, N), float("nan"))
    assert grouped_gemm(a, w, rows, out=out, config=tile(98)) is out
    assert_near(out, reference(a, w))
    assert_near(grouped_gemm(a, w, rows, config=GEMM), reference(a, w))
    assert of(launched()) == [("grouped_gemm", 98, "given")] * 2
    assert torch.equal(out, grouped_gemm(a, w, rows, config=tile(66)))      # tiles do not change how sums are made
    assert moe_xe.explain(a, w, rows, config=tile(66)).config == tile(66)


def test_what_is_printed(launched, monkeypatch, capsys):
    a, w, rows = operands()
    grouped_gemm(a, w, rows, config=tile(98))
    line, = launched()
    assert line == ("grouped_gemm", f"f32 N={N} K={K} enk", str(E), str(ROWS), str(tile(98)), "given")
    with force_config(tile(66)):
        grouped_gemm(a, w, rows, config=tile(98))
    grouped_gemm(a, w, rows)
    assert [line.origin for line in launched()] == ["forced", "chosen"]
    for value in ("0", "", None):
        monkeypatch.delenv("MOE_XE_PRINT_CONFIG") if value is None else monkeypatch.setenv("MOE_XE_PRINT_CONFIG", value)
        grouped_gemm(a, w, rows)
        assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("config, widths", [(GEMM, [("grouped_gemm", 98, "given"), ("grouped_gemm", 66, "given"), ("grouped_outer", 50, "given")]),
                                            (tile(98), [("grouped_gemm", 98, "given")]), (GemmConfigs(dW=outer_tile(50)), [("grouped_outer", 50, "given")])],
                         ids=["all", "a tile", "dW"])
def test_gradients_of_grouped_gemm(config, widths, launched):
    a, w, rows = operands(True)
    gradient = torch.randn(ROWS, N)
    grouped_gemm(a, w, rows, config=config).backward(gradient)
    lines = launched()
    assert [each for each in of(lines) if each[2] == "given"] == widths
    assert len(lines) == 3
    expected = torch.autograd.grad(reference(a, w), (a, w), gradient.double())
    assert_near(a.grad, expected[0]), assert_near(w.grad, expected[1])


def test_grouped_outer(launched):
    left, right, rows = torch.randn(ROWS, N), torch.randn(ROWS, K), torch.tensor(COUNTS, dtype=torch.int32)
    expected = torch.stack([x.double().T @ y.double() for x, y in zip(left.split(COUNTS), right.split(COUNTS))])
    assert_near(grouped_outer(left, right, rows, config=outer_tile(50)), expected)
    out = torch.ones(E, N, K)
    assert_near(grouped_outer(left, right, rows, config=outer_tile(66), out=out, accumulate=True), expected + 1)
    assert of(launched()) == [("grouped_outer", 50, "given"), ("grouped_outer", 66, "given")]


ENDS = torch.tensor(COUNTS).cumsum(0).int()
FORMS = {"2D x 3D": ((ROWS, K), (E, K, N), tile(98)), "2D x 2D": ((N, ROWS), (ROWS, K), outer_tile(50)),
         "3D x 2D": ((E, N, K), (K, ROWS), GEMM), "3D x 3D": ((E, 9, K), (E, K, N), GEMM)}


@pytest.mark.parametrize("form", [pytest.param(form, marks=[pytest.mark.full] * (form == "3D x 2D")) for form in FORMS])
def test_grouped_mm(form, launched):
    a_shape, b_shape, config = FORMS[form]
    a, b = torch.randn(a_shape, requires_grad=True), torch.randn(b_shape, requires_grad=True)
    offs = None if form == "3D x 3D" else ENDS
    out, plain = grouped_mm(a, b, offs=offs, config=config), grouped_mm(a, b, offs=offs)
    assert_near(out, plain)
    forward, chosen = launched()
    assert (forward.origin, chosen.origin) == ("given", "chosen") and forward.config == str(config.forward if config is GEMM else config)
    gradient = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, (a, b), gradient), torch.autograd.grad(plain, (a, b), gradient)):
        assert_near(got, want)
    given = [line.config for line in launched() if line.origin == "given"]
    assert sorted(given) == (sorted([str(GEMM.dX), str(GEMM.dW)]) if config is GEMM else [])


MOE = MoeConfig(GemmConfigs(tile(72), tile(48), outer_tile(40)), GemmConfigs(tile(46), tile(36), outer_tile(34)))
FIRST, SECOND = f"N={2 * INTERMEDIATE} K={HIDDEN}", f"N={HIDDEN} K={INTERMEDIATE}"
# of the two GEMMs' forward, dX and dW: how the lines of MOE_XE_PRINT_CONFIG begin, and the configuration
SIX = {("grouped_gemm", FIRST, 72), ("grouped_gemm", f"N={HIDDEN} K={2 * INTERMEDIATE}", 48), ("grouped_outer", f"P={2 * INTERMEDIATE} Q={HIDDEN}", 40),
       ("grouped_gemm", SECOND, 46), ("grouped_gemm", f"N={INTERMEDIATE} K={HIDDEN}", 36), ("grouped_outer", f"P={HIDDEN} Q={INTERMEDIATE}", 34)}


def given(lines) -> set[tuple]:
    return {(op, " ".join(line.problem.split()[1:3]), width) for line, (op, width, origin) in zip(lines, of(lines)) if origin == "given"}


def block(**options) -> dict:
    arguments = make(**options)
    arguments["topk_ids"] %= 6
    return {name: moved(value, CPU) for name, value in arguments.items()}


@pytest.mark.parametrize("options", [{}, pytest.param(dict(shared=True), marks=pytest.mark.full)], ids=["routed", "with a shared expert of another size"])
def test_fused_moe(options, launched):
    arguments = block(**({"shared": make_shared(INTERMEDIATE + 4)} if options else {}))
    assert_right(fused_moe(**arguments, config=MOE), reference_moe(**arguments))
    lines = launched()
    assert given(lines) == {each for each in SIX if each[1:] in {(FIRST, 72), (SECOND, 46)}}
    assert [line.origin for line in lines].count("chosen") == len(lines) - 2


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("function", [fused_moe, lora_moe])
def test_training_uses_each_of_six(function, recompute, launched):
    arguments = block()
    if function is lora_moe:
        arguments["lora13"] = LoraAdapter(torch.randn(6, 8, HIDDEN), torch.randn(6, 2 * INTERMEDIATE, 8))
    names = ("hidden_states", "w13", "w2", "topk_weights")
    for name in names:
        arguments[name].requires_grad_()
    gradients = []
    for config in (MOE, None):
        out = function(**arguments, config=config, recompute=recompute)
        gradients.append((out, *torch.autograd.grad(out.square().sum(), [arguments[name] for name in names])))
        assert given(launched()) == (SIX if config is MOE else set())
    for got, want in zip(*gradients):
        assert_near(got, want)


def test_one_part_of_the_block(launched):
    fused_moe(**block(), config=MoeConfig(down=tile(46)), fusions=Fusions(launches=False))
    assert given(launched()) == {("grouped_gemm", SECOND, 46)}


def test_compiles_to_one_graph(launched):
    a, w, rows = operands(True)
    arguments, outer = block(), outer_tile(66)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(a, w, x):
        y = grouped_gemm(a, w, rows, config=GEMM)
        z = grouped_outer(y, a, rows, config=outer)
        return y.sum() + z.sum() + fused_moe(**(arguments | dict(hidden_states=x)), config=MOE).sum()

    step(a, w, arguments["hidden_states"]).backward()
    lines = launched()
    assert {("grouped_gemm", 98, "given"), ("grouped_outer", 66, "given"), ("grouped_gemm", 66, "given"), ("grouped_outer", 50, "given"),
            ("grouped_gemm", 72, "given"), ("grouped_gemm", 46, "given")} <= set(of(lines))


@pytest.mark.parametrize("choice", [GEMM, tile(98)], ids=["configs", "config"])
def test_opcheck(choice):
    a, w, rows = operands()
    text = Choice(choice).text
    torch.library.opcheck(torch.ops.moe_xe.grouped_gemm, (*INPUTS.flatten(Inputs(a, w, rows)), torch.float32, "counts", "dynamic", text, False))
    out = torch.empty(ROWS, N)
    torch.library.opcheck(torch.ops.moe_xe.grouped_gemm_out, (*INPUTS.flatten(Inputs(a, w, rows)), out, "counts", "dynamic", text))


GENERIC = GenericConfig((8,), 32, 2, 8, Schedule.dynamic, (4,), (16,))
A, W, SIZES = operands()
CALLS = {
    "grouped_gemm": (lambda **options: grouped_gemm(A, W, SIZES, **options), tile(98), "TileConfig or GemmConfigs"),
    "grouped_mm": (lambda **options: grouped_mm(A, W.transpose(1, 2), offs=ENDS, **options), tile(98), "TileConfig or GemmConfigs"),
    "grouped_mm of columns": (lambda **options: grouped_mm(A.T, A, offs=ENDS, **options), outer_tile(50), "OuterConfig"),
    "grouped_outer": (lambda **options: grouped_outer(A, A, SIZES, **options), outer_tile(50), "OuterConfig"),
    "fused_moe": (lambda **options: fused_moe(**block(), **options), MOE, "MoeConfig"),
    "lora_moe": (lambda **options: lora_moe(**block(), **options), MOE, "MoeConfig"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_arguments(name, launched):
    call, fits, kinds = CALLS[name]
    for wrong in ("autotune", 5, {}, type(fits), outer_tile(50) if "TileConfig" in kinds else tile(98)):
        with pytest.raises(TypeError, match=f"config must be a {kinds}, or None, got {type(wrong).__name__}"):
            call(config=wrong)
    for wrong in (None, 1, "yes"):
        with pytest.raises(TypeError, match=f"autotune must be True or False, got {wrong!r}"):
            call(autotune=wrong)
    with pytest.raises(ValueError, match="config must be None with autotune=True, got "):
        call(config=fits, autotune=True)
    assert launched() == []


def test_configurations_that_do_not_fit():
    with pytest.raises(ValueError, match="config does not fit: the cpu kernel computes this call and needs a CpuConfig; got GenericConfig"):
        grouped_gemm(A, W, SIZES, config=GENERIC)
    with pytest.raises(ValueError, match="needs a CpuConfig"):
        fused_moe(**block(), config=MoeConfig(down=GENERIC))
    with pytest.raises(ValueError, match="schedule must be left out where a config is given, which has its own; got 'static'"):
        grouped_gemm(A, W, SIZES, config=tile(98), schedule="static")
    with pytest.raises(ValueError, match="splits must be 1 where d is accumulated"):
        grouped_outer(A, A, SIZES, config=replace(outer_tile(50), splits=2), out=torch.zeros(E, K, K), accumulate=True)


def test_nothing_to_compute():
    empty = torch.zeros(E, dtype=torch.int32)
    assert grouped_gemm(A[:0], W, empty, config=tile(98)).shape == (0, N)
    assert not grouped_outer(A[:0], A[:0], empty, config=outer_tile(50)).any()


@pytest.mark.parametrize("training", [False, True])
def test_what_runs_is_waited_for_when_a_later_launch_fails(training, monkeypatch):
    """It uses memory that an error frees."""
    arguments, waits, wait = block(), [], Queue.wait
    arguments["w13"].requires_grad_(training)
    monkeypatch.setattr(Queue, "wait", lambda queue: waits.append(1) or wait(queue))
    with pytest.raises(ValueError, match="config does not fit"):
        fused_moe(**arguments, config=MoeConfig(down=GENERIC))
    assert waits
