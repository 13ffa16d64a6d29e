"""The activations and their gradients against float64 autograd: the CPU device's kernels, and the GPU's on the CPU device."""
from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_xe.device import queue_for
from moe_xe.ops.block import activate as module
from moe_xe.ops.block.activate import ActivationGradients, activate, activate_backward, launch_activate
from moe_xe.ops.submission import Submission
from moe_xe.plan.launch import Target
from moe_xe.plan.problem import Activation, ActivationKind

from .case import activated

pytestmark = pytest.mark.usefixtures("machines_instructions")

POISON = 777
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HALVES, INTERLEAVED, PLAIN = (True, False), (True, True), (False, False)
LAYOUTS = {HALVES: "halves", INTERLEAVED: "interleaved", PLAIN: "plain"}
FIELDS = ActivationGradients._fields


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for."""
    kind: str
    layout: tuple[bool, bool]
    size: int
    z: torch.dtype = F32
    g: torch.dtype = F32
    dz: torch.dtype = F32
    hs: torch.dtype = F32
    limit: float | None = None

    @property
    def activation(self) -> Activation:
        return Activation(ActivationKind(self.kind), *self.layout, 1.702 if self.kind == "swiglu_oai" else 1.0, self.limit)

    def __str__(self) -> str:
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (self.z, self.g, self.dz, self.hs))
        return f"{self.kind}-{LAYOUTS[self.layout]}-{self.size}-{dtypes}"


# every activation in every layout; sizes that are whole vectors of some instruction sets or of none
KINDS = [
    Kind("silu", HALVES, 300, BF16, BF16, BF16, BF16), Kind("silu", INTERLEAVED, 37), Kind("silu", PLAIN, 72, F16, F32, F16, BF16),
    Kind("gelu", HALVES, 5, limit=1.5), Kind("gelu", INTERLEAVED, 144, BF16, F32, BF16, F32), Kind("gelu", PLAIN, 33, F16, F16, F16, F16),
    Kind("gelu_tanh", HALVES, 144, BF16, BF16, F32, F32, 1.5), Kind("gelu_tanh", INTERLEAVED, 8, F16, BF16, F16, F16),
    Kind("gelu_tanh", PLAIN, 1000, F32, F32, BF16, F32, 2.0),
    Kind("relu2", HALVES, 17, F32, BF16, F32, F32), Kind("relu2", INTERLEAVED, 1, F16, F32, F16, F16, 1.0), Kind("relu2", PLAIN, 64),
    Kind("swiglu_oai", HALVES, 520, limit=0.75), Kind("swiglu_oai", INTERLEAVED, 90, BF16, F32, BF16, BF16, 1.5),
    Kind("swiglu_oai", PLAIN, 100, BF16, BF16, BF16, BF16),
]


@pytest.fixture(params=["own", "gpu"])
def kernels(request, monkeypatch, device):
    """The device's own kernels, and the GPU's wherever the tensors are."""
    if request.param == "gpu":
        if device.type != "cpu":
            pytest.skip("these are the device's own kernels")
        monkeypatch.setattr(module, "target_of", lambda facts: Target(is_cpu=False, cores=4, has_dpas=False))
    return request.param


def strided(values: torch.Tensor, gap: int) -> torch.Tensor:
    """The same rows, further apart; poison between them."""
    whole = torch.full((values.shape[0], values.shape[1] + gap), POISON, dtype=values.dtype, device=values.device)
    view = whole[:, :values.shape[1]]
    return view.copy_(values)


def make(kind: Kind, rows: int, *, gap: int = 0, unused: float = 0.0, scales: bool = True, device="cpu") -> dict:
    """Random arguments; unused rows hold NaN, and some values of z are just at the limits."""
    z = 2 * torch.randn(rows, kind.size * (2 if kind.layout[0] else 1))
    if kind.limit is not None:
        cut = torch.rand(z.shape) < 0.2
        z[cut] = (kind.limit * z.sign())[cut]
    row_pairs = None
    if unused:
        row_pairs = torch.where(torch.rand(rows) < unused, -1, torch.arange(rows)).int()
        z[row_pairs < 0] = float("nan")
    arguments = dict(z=strided(z.to(kind.z), gap), g=strided(torch.randn(rows, kind.size).to(kind.g), gap),
                     row_scales=torch.randn(rows) if scales else None, row_pairs=row_pairs)
    return {name: value if value is None or str(device) == "cpu" else value.to(device) for name, value in arguments.items()}


def reference(kind: Kind, z, g, row_scales=None, row_pairs=None) -> ActivationGradients:
    """In float64, by autograd."""
    act, g = kind.activation, g.cpu().double()
    z = z.detach().cpu().double().requires_grad_()
    h = activated(z, act.kind.value, act.gated, act.interleaved, act.alpha, act.limit)
    scales = torch.ones(len(z)).double() if row_scales is None else row_scales.cpu().double()
    hs = h * scales[:, None]
    hs.backward(g)
    return ActivationGradients(z.grad, hs.detach(), (g * h.detach()).sum(1))


def run(kind: Kind, z, g, row_scales=None, row_pairs=None, gap: int = 0) -> ActivationGradients:
    """launch_activate into poisoned rows; what lies between them must stay."""
    rows, guard = len(z), 3
    wholes = [torch.full((rows + guard, columns), POISON, dtype=dtype, device=z.device) for columns, dtype in (
        (z.shape[1] + gap, kind.dz), (kind.size + gap, kind.hs), (1, F32))]
    dz, hs = wholes[0][:rows, :z.shape[1]], wholes[1][:rows, :kind.size]
    queue = queue_for(z.device)
    launch_activate(Submission(queue, z.device), z, kind.activation, g=g, row_scales=row_scales, row_pairs=row_pairs, dz=dz, hs=hs,
                    dscale=wholes[2][:rows, 0])
    queue.wait()
    for whole in wholes:
        assert (whole[rows:] == POISON).all(), "written beyond the last row"
    assert (wholes[0][:, dz.shape[1]:] == POISON).all() and (wholes[1][:, kind.size:] == POISON).all(), "written between rows"
    return ActivationGradients(dz.cpu(), hs.cpu(), wholes[2][:rows, 0].cpu())


def assert_close(got: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Within one rounding to got's type, and float32's errors beside `scale`, the largest value by default.

    Beside 1 too: far from zero the values of gelu are smaller than its terms.
    """
    rounding = {BF16: 2**-8, F16: 2**-10, F32: 2**-22}[got.dtype]
    largest = wanted.abs().max() if scale is None else scale
    assert ((got.double() - wanted).abs() <= rounding * wanted.abs() + 4e-6 * (largest + 1)).all()


def check(kind: Kind, arguments: dict, got: ActivationGradients) -> None:
    got = type(got)(*(getattr(got, name).cpu() for name in FIELDS))
    pairs = arguments["row_pairs"]
    used = torch.ones(len(arguments["z"]), dtype=torch.bool) if pairs is None else pairs.cpu() >= 0
    assert (got.dz[~used] == POISON).all() and (got.hs[~used] == POISON).all() and (got.dscale[~used] == 0).all()
    if not used.any():
        return
    here = {name: None if value is None else value.cpu()[used] for name, value in arguments.items()}
    wanted = reference(kind, **here)
    assert_close(got.dz[used], wanted.dz)
    assert_close(got.hs[used], wanted.hs)
    act, z = kind.activation, here["z"].double()
    h = activated(z, act.kind.value, act.gated, act.interleaved, act.alpha, act.limit)
    assert_close(got.dscale[used], wanted.dscale, (here["g"].double() * h).abs().sum(1))


@pytest.mark.few(6)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 70), gap=st.sampled_from([0, 3, 8]), unused=st.sampled_from([0.3, 1.0]))
def test_gradients(kind, kernels, device, rows, gap, unused):
    arguments = make(kind, rows, gap=gap, unused=unused, device=device)
    check(kind, arguments, run(kind, **arguments, gap=gap))


@pytest.mark.parametrize("kind", [pytest.param(KINDS[0], marks=pytest.mark.full), pytest.param(KINDS[13], marks=pytest.mark.full), KINDS[2]], ids=str)
def test_without_scales_and_pairs(kind, kernels, device):
    arguments = make(kind, 31, scales=False, device=device)
    check(kind, arguments, run(kind, **arguments))


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", KINDS[::2], ids=str)
def test_forward(kind, device):
    arguments = make(kind, 40, gap=1, unused=0.3, device=device)
    z, pairs = arguments["z"], arguments["row_pairs"]
    h, used = activate(z, kind.activation, row_pairs=pairs, out_dtype=kind.hs).cpu(), pairs.cpu() >= 0
    act = kind.activation
    wanted = activated(z.cpu().double(), act.kind.value, act.gated, act.interleaved, act.alpha, act.limit)
    assert h.dtype == kind.hs
    assert_close(h[used], wanted[used])


@pytest.mark.few(3)
@pytest.mark.parametrize("want", [("dz",), ("hs",), ("dscale",), ("hs", "dz"), ["dscale", "hs"], {"dz", "dscale"}], ids=lambda want: "-".join(sorted(want)))
def test_wanted(want, device):
    kind = KINDS[4]
    arguments = make(kind, 20, device=device)
    everything = activate_backward(**arguments, activation=kind.activation)
    some = activate_backward(**arguments, activation=kind.activation, want=want)
    for name in FIELDS:
        one, other = getattr(some, name), getattr(everything, name)
        assert (one is not None) == (name in want)
        assert one is None or torch.equal(one, other)
    assert everything.dz.dtype == everything.hs.dtype == BF16 and everything.dscale.dtype == F32
    check(kind, arguments, everything)


def test_repeatable(kernels, device):
    kind = KINDS[12]
    arguments = make(kind, 200, device=device)
    first, second = run(kind, **arguments), run(kind, **arguments)
    assert all(torch.equal(one, other) for one, other in zip(first, second))
    alone = run(kind, **{name: None if value is None else value[77:78] for name, value in arguments.items()})
    assert all(torch.equal(one[77:78], other) for one, other in zip(first, alone)), "depends on other rows"


@pytest.mark.parametrize("kind", [pytest.param(KINDS[1], marks=pytest.mark.full), KINDS[12], pytest.param(KINDS[6], marks=pytest.mark.full)], ids=str)
def test_special_values_stay_in_their_row(kind, kernels, device):
    arguments = make(kind, 12, device=device)
    clean = run(kind, **arguments)
    arguments["z"][3, 4 % kind.size] = float("nan")
    arguments["g"][5, 0] = float("inf")
    arguments["z"][7, 0] = float("-inf")
    got = run(kind, **arguments)
    others = [row for row in range(12) if row not in (3, 5, 7)]
    assert all(torch.equal(one[others], other[others]) for one, other in zip(got, clean))
    assert got.dz[3].isnan().any() and got.hs[3].isnan().sum() == 1 and got.dscale[3].isnan()
    assert torch.equal(got.hs[5], clean.hs[5]) and not got.dscale[5].isfinite()


@pytest.mark.parametrize("kind", [pytest.param(KINDS[5], marks=pytest.mark.full), KINDS[7], pytest.param(KINDS[3], marks=pytest.mark.full)], ids=str)
def test_in_place(kind, kernels, device):
    kind = Kind(kind.kind, kind.layout, kind.size, kind.z, kind.z, kind.z, kind.z, kind.limit)
    arguments = make(kind, 25, gap=3, device=device)
    wanted = run(kind, **arguments)
    dscale = torch.full((25,), POISON, dtype=F32, device=device)
    queue = queue_for(dscale.device)
    launch_activate(Submission(queue, dscale.device), **arguments, activation=kind.activation, dz=arguments["z"], hs=arguments["g"], dscale=dscale)
    queue.wait()
    for got, other in zip((arguments["z"], arguments["g"], dscale), wanted):
        assert torch.equal(got.cpu(), other)


def test_nothing(device):
    for size, activation in ((6, Activation()), (3, Activation(gated=False))):
        z, g = torch.empty(0, size, device=device), torch.empty(0, 3, device=device)
        assert activate(z, activation).shape == (0, 3)
        assert [tuple(x.shape) for x in activate_backward(z, g, activation)] == [(0, size), (0, 3), (0,)]


@pytest.mark.parametrize("kind", [pytest.param(KINDS[0], marks=pytest.mark.full), KINDS[13]], ids=str)
def test_opcheck(kind, device):
    arguments = make(kind, 12, device=device)
    z, g, flat = arguments["z"], arguments["g"], module._flat(kind.activation)
    torch.library.opcheck(torch.ops.moe_xe.activate, (z, None, *flat, BF16))
    torch.library.opcheck(torch.ops.moe_xe.activate_backward, (z, g, arguments["row_scales"], None, *flat, F32, [True, False, True]))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, backend, device):
    kind = KINDS[13]
    arguments = make(kind, 30, device=device)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    def step(z, g, row_scales, row_pairs):
        return activate(z, kind.activation), activate_backward(z, g, kind.activation, row_scales=row_scales)

    h, gradients = step(**arguments)
    assert torch.equal(h, activate(arguments["z"], kind.activation))
    check(kind, arguments, ActivationGradients(*(x.cpu() for x in gradients)))


Z, G = torch.randn(4, 6), torch.randn(4, 3)
WRONG = {
    "z is a list": (dict(z=[[1.0]]), TypeError, r"z must be a torch.Tensor \[rows, 2I\], got list"),
    "z is 3D": (dict(z=Z[None]), ValueError, r"z must have 2 dimensions \[rows, 2I\], got float32\[1, 4, 6\]"),
    "z is double": (dict(z=Z.double()), TypeError, "z must be bfloat16, float16 or float32, got torch.float64"),
    "z is odd": (dict(z=Z[:, :5]), ValueError, r"z must have pairs of columns, as the activation is gated, got float32\[4, 5\]"),
    "z is empty": (dict(z=Z[:, :0], activation=Activation(gated=False)), ValueError, r"z must have columns, got float32\[4, 0\]"),
    "z is transposed": (dict(z=torch.randn(6, 4).T), ValueError, "z's rows must be contiguous"),
    "z has too many rows": (dict(z=Z[:1].expand(2**24 + 1, 6)), ValueError, r"z must have at most 16777216 rows .* got float32\[16777217, 6\]"),
    "activation is text": (dict(activation="silu"), TypeError, "activation must be a moe_xe.plan.problem.Activation, got str"),
    "limit is zero": (dict(activation=Activation(limit=0.0)), ValueError, "activation.limit must be positive and finite in float32, got activation.limit = 0.0"),
    "alpha is infinite": (dict(activation=Activation(alpha=float("inf"))), ValueError, "activation.alpha must be finite in float32, got activation.alpha = inf"),
    "g is int": (dict(g=G.int()), TypeError, "g must be bfloat16, float16 or float32, got torch.int32"),
    "g has z's shape": (dict(g=Z), ValueError, r"g must be \[rows, I\] = \[4, 3\], got float32\[4, 6\]"),
    "g is transposed": (dict(g=torch.randn(3, 4).T), ValueError, "g's rows must be contiguous"),
    "scales are bfloat16": (dict(row_scales=torch.ones(4).bfloat16()), TypeError, "row_scales must be float32, got torch.bfloat16"),
    "scales are few": (dict(row_scales=torch.ones(3)), ValueError, "row_scales must have one entry for each of the 4 rows, got 3"),
    "pairs are int64": (dict(row_pairs=torch.arange(4)), TypeError, "row_pairs must be int32, got torch.int64"),
    "nothing is wanted": (dict(want=()), ValueError, r"want must be some of \('dz', 'hs', 'dscale'\), got \(\)"),
    "something else is wanted": (dict(want=("dx",)), ValueError, r"want must be some of .* got \('dx',\)"),
    "want is text": (dict(want="dz"), ValueError, "want must be some of .* got 'dz'"),
    "out_dtype is int": (dict(out_dtype=torch.int8), TypeError, "out_dtype must be bfloat16, float16 or float32, got torch.int8"),
    "on two devices": (dict(g=G.to("meta")), ValueError, "z is on cpu, g is on meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        activate_backward(**dict(z=Z, g=G, activation=Activation()) | changes)


def test_gradients_need_g(device):
    with pytest.raises(ValueError, match="g must be given for dz and dscale, got None"):
        launch_activate(Submission(queue_for(device), device), Z.to(device), Activation(), dscale=torch.empty(4, device=device))


def test_misaligned_memory():
    z = torch.frombuffer(bytearray(25), dtype=torch.float32, offset=1, count=6).view(1, 6)
    with pytest.raises(ValueError, match="z must be aligned to its 4-byte elements"):
        activate(z, Activation())


@pytest.mark.parametrize("kind", [pytest.param(KINDS[1], marks=pytest.mark.full), KINDS[7]], ids=str)
def test_gradient(kind, device):
    """Of the op on its own; rows that are not used have none."""
    gated, _ = kind.layout
    z = torch.randn(13, 2 * kind.size if gated else kind.size, device=device).to(kind.z).requires_grad_()
    pairs = torch.randperm(13, device=device).int() - 3
    forward = lambda z: activate(z, kind.activation, row_pairs=pairs, out_dtype=kind.hs)
    h = forward(z)
    gradient = torch.randn(h.shape, device=device).to(h.dtype)
    h.backward(gradient)
    reference = z.detach().double().requires_grad_()
    act = kind.activation
    activated(reference, kind.kind, *kind.layout, act.alpha, act.limit).backward(torch.where(pairs[:, None] < 0, 0, gradient.double()))
    assert z.grad.dtype == z.dtype and (z.grad[pairs < 0] == 0).all()
    torch.testing.assert_close(z.grad.double(), reference.grad, rtol=1e-2 if kind.z != F32 else 1e-4, atol=1e-2 if kind.z != F32 else 1e-4)
    dz, = torch.autograd.grad(forward(z).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="activate has no second derivatives"):
        dz.sum().backward()
