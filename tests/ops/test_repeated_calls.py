"""A call that was made before is repeated without checks and plans; one that differs in anything is not that call.

Every test first makes a call twice, so that its repetition is known, and then changes one thing.
"""
from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import moe_xe
from moe_xe.device import on_queue, queue_for
from moe_xe.ops import calls as calls_module, launch as launch_module
from moe_xe.ops.block import stages
from moe_xe.ops.calls import Calls, Known, known_calls
from moe_xe.ops.gemm.grouped_outer import grouped_outer
from moe_xe.ops.submission import Repeat, Submission
from moe_xe.plan.gemm.config import GenericConfig, Schedule
from moe_xe.plan.override import force_config
from moe_xe.runtime import Queue

from .block.case import make, moved
from .every_op import OpCase, every_op
from .tiles import tile

# whose launches are all there is to them
REPEATED = ["grouped_gemm", "grouped_gemm scattered", "grouped_mm", "fused_moe", "route", "sort_tokens", "combine"]
H, N, E, COUNTS = 16, 8, 3, [5, 0, 7]       # whose kernel many tests of arguments use
ROWS = sum(COUNTS)
GENERIC = GenericConfig(heights=(16,), tile_width=32, raster_group=1, min_fill_eighths=8, schedule=Schedule.dynamic,
                        sub_group_rows=(8,), sub_group_columns=(16,))


@pytest.fixture
def repeats(monkeypatch):
    """How many calls were repeated: a list that grows."""
    run, seen = Repeat.run, []

    def counting(self, *arguments):
        results = run(self, *arguments)
        if results is not None:
            seen.append(self)
        return results

    monkeypatch.setattr(Repeat, "run", counting)
    return seen


def gemm_arguments(dtype=torch.float32, device="cpu") -> dict:
    return dict(a=torch.randn(ROWS, H, device=device).to(dtype), w=torch.randn(E, N, H, device=device).to(dtype),
                tokens_per_expert=torch.tensor(COUNTS, device=device))


@pytest.fixture
def gemm():
    """The arguments of a call that is known."""
    arguments = gemm_arguments()
    for _ in range(2):
        moe_xe.grouped_gemm(**arguments)
    assert len(known_calls()) == 2      # of the function, and of torch's op
    return arguments


def results_of(case: OpCase) -> list[torch.Tensor]:
    result = case()
    return list(result) if isinstance(result, tuple) else [result]


def poisoned(name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device; of what is written to, with junk. A workspace's pieces lie as its address says: each begins at a multiple
    of 256."""
    if name == "workspace":
        memory = torch.full((len(tensor) + 256,), 255, dtype=torch.uint8, device=device)
        return memory[-memory.data_ptr() % 256:][:len(tensor)]
    return (torch.full_like(tensor, float("nan")) if name == "out" else tensor).to(device, copy=True)


def fresh(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> OpCase:
    return every_op(dtype)[name].mapped(lambda name, tensor: poisoned(name, tensor, device))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("name", REPEATED)
def test_the_same_bits_from_other_tensors(name, dtype, repeats, device):
    """Fresh contents at other addresses, against a process' first call of the kind."""
    results_of(fresh(name, device, dtype))
    assert not repeats
    for _ in range(3):
        case = fresh(name, device, dtype)
        before = len(repeats)
        got = [result.clone() for result in results_of(case)]
        assert len(repeats) == before + 1
        known_calls().clear()
        wanted = results_of(case.mapped(lambda name, tensor: poisoned(name, tensor, device)))
        assert all(torch.equal(x, y) for x, y in zip(got, wanted)), name
        assert len(repeats) == before + 1


@pytest.mark.parametrize("name", REPEATED)
def test_the_same_buffers_with_other_contents(name, repeats, device):
    """As a captured graph is replayed."""
    case, other = fresh(name, device), fresh(name, device)
    results_of(case)
    for (_, tensor), (_, content) in zip(case.tensors(), other.tensors(), strict=True):
        tensor.copy_(content)
    got = [result.clone() for result in results_of(case)]
    assert len(repeats) == 1
    known_calls().clear()
    assert all(torch.equal(x, y) for x, y in zip(got, results_of(other)))


@pytest.mark.parametrize("recompute", [True, False])
def test_the_same_gradients(recompute, repeats, device):
    """The launches of a step's ops are repeated in the next one, forward and backward."""
    def step() -> list[torch.Tensor]:
        leaves = {name: value.clone().requires_grad_(value.is_floating_point()) if isinstance(value, torch.Tensor) else value
                  for name, value in arguments.items()}
        out = moe_xe.fused_moe(**leaves, recompute=recompute)
        out.square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves.values() if isinstance(leaf, torch.Tensor) and leaf.requires_grad)]

    def fresh_arguments() -> dict:
        values = {name: moved(value, device) for name, value in make(bias=(torch.float32, torch.float32)).items()}
        return values | dict(topk_ids=values["topk_ids"] % 6)

    arguments = fresh_arguments()
    step()
    first, arguments = len(repeats), fresh_arguments()
    got = step()
    assert len(repeats) - first >= 8      # forward, the GEMMs of backward, activate_backward, combine
    known_calls().clear()
    assert len(got) == 7 and all(torch.equal(x, y) for x, y in zip(got, step()))


def test_results_are_new_and_keep_nothing(gemm, repeats):
    first, second = moe_xe.grouped_gemm(**gemm), moe_xe.grouped_gemm(**gemm)
    assert len(repeats) == 2 and first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    gone = [weakref.ref(tensor) for tensor in (first, second, *gemm.values())]
    del first, second
    gemm.clear()
    gc.collect()
    assert all(reference() is None for reference in gone)


def test_many_experts_and_empty_ones(repeats):
    a, w = torch.randn(40, H), torch.randn(512, N, H)
    for expert in (0, 511, 200):     # all rows are one's
        counts = torch.zeros(512, dtype=torch.int64)
        counts[expert] = 40
        assert torch.allclose(moe_xe.grouped_gemm(a, w, counts), a @ w[expert].T, atol=1e-4)
    counts.zero_()
    out = torch.full((40, N), float("nan"))
    for _ in range(2):
        assert moe_xe.grouped_gemm(a, w, counts, out=out) is out and out.isnan().all()
    assert len(repeats) == 3


def test_no_rows(repeats):
    nothing, w, counts = torch.empty(0, H), torch.randn(E, N, H), torch.zeros(E, dtype=torch.int32)
    for _ in range(2):
        assert moe_xe.grouped_gemm(nothing, w, counts).shape == (0, N)
    assert len(repeats) == 1


# ------------------------------------------------------------------------------------------------- other arguments

OTHER = {
    "a of another dtype": (dict(a=torch.randn(ROWS, H).double()), TypeError, "a must be bfloat16"),
    "a of another K": (dict(a=torch.randn(ROWS, H + 1)), ValueError, "must agree in K"),
    "a with columns apart": (dict(a=torch.randn(H, ROWS).T), ValueError, "rows must be contiguous"),
    "a of four dimensions": (dict(a=torch.randn(1, 1, ROWS, H)), ValueError, "a must have 2 dimensions"),
    "a is no tensor": (dict(a=[1.0]), TypeError, "a must be a torch.Tensor"),
    "a on another device": (dict(a=torch.randn(ROWS, H, device="meta")), ValueError, "all tensors must be on one device"),
    "w of another E": (dict(w=torch.randn(E + 1, N, H)), ValueError, "tokens_per_expert must have one entry"),
    "a float of a count": (dict(gather_divisor=1.0), TypeError, "gather_divisor must be an int"),
    "a bool of a count": (dict(gather_divisor=True), TypeError, "gather_divisor must be an int"),
    "an int of a flag": (dict(check=0), TypeError, "check must be a bool"),
    "an unknown schedule": (dict(schedule="random"), ValueError, "schedule must be"),
    "an unknown layout": (dict(weight_layout="nek"), ValueError, "weight_layout must be"),
    "a config of nothing": (dict(config="fast"), TypeError, "config must be a"),
    "values": (dict(tokens_per_expert=torch.tensor([5, 0, 9]), check=True), ValueError, "sums to 14"),
}


@pytest.mark.parametrize("what", OTHER)
def test_another_argument_is_checked(what, gemm):
    change, error, message = OTHER[what]
    for known in ({}, {"gather_divisor": 1}, {"check": False}, {"check": True}):
        moe_xe.grouped_gemm(**gemm | known)
    with pytest.raises(error, match=message):
        moe_xe.grouped_gemm(**gemm | change)


def test_bool_and_int_and_signed_zeros_are_different(repeats):
    logits = torch.randn(4, 8)
    moe_xe.route(logits, 1)
    with pytest.raises(TypeError, match="top_k must be an int"):
        moe_xe.route(logits, True)
    signs = [moe_xe.route(logits, 1, scaling_factor=factor)[0].signbit() for factor in (0.0, -0.0, 0.0, -0.0)]
    assert not signs[0].any() and signs[1].all() and not signs[2].any() and signs[3].all() and len(repeats) == 2


def test_a_number_that_may_change_is_not_remembered(repeats):
    class Number:
        value = 1

        def __index__(self):
            return self.value

    number, logits = Number(), torch.randn(4, 8)
    assert moe_xe.route(logits, number)[1].shape == (4, 1)
    number.value = 2
    assert moe_xe.route(logits, number)[1].shape == (4, 2)


def test_views(gemm, repeats):
    """Other strides, another alignment and a negated view are other calls; so is transposed weights' layout."""
    a, w = gemm["a"], gemm["w"]
    wanted = moe_xe.grouped_gemm(**gemm)
    wide = torch.randn(ROWS, H + 3)
    wide[:, 1:H + 1] = a
    memory = torch.empty(E * N * H + 1)
    shifted = memory[1:].view(E, N, H).copy_(w)
    negated = torch._neg_view(-a)
    for change in (dict(a=wide[:, 1:H + 1]), dict(w=shifted), dict(a=negated), dict(a=negated),
                   dict(w=w.transpose(1, 2), weight_layout="ekn"), dict(w=w.transpose(1, 2).contiguous(), weight_layout="ekn")):
        assert torch.allclose(moe_xe.grouped_gemm(**gemm | change), wanted, atol=1e-5)


def test_a_misaligned_tensor(gemm):
    memory = torch.zeros(ROWS * H * 4 + 1, dtype=torch.uint8)
    crooked = memory[1:].view(-1)
    odd = torch.empty(0).set_(crooked.untyped_storage(), 0, (ROWS, H), (H, 1))
    assert moe_xe.grouped_gemm(**gemm | dict(a=odd)).abs().sum() == 0
    odd = torch.frombuffer(bytearray(ROWS * H * 4 + 1), dtype=torch.uint8)[1:]
    odd = torch.frombuffer(odd.numpy().data, dtype=torch.float32).view(ROWS, H)
    with pytest.raises(ValueError, match="a must be aligned to its 4-byte elements"):
        moe_xe.grouped_gemm(**gemm | dict(a=odd))


@pytest.mark.parametrize("left", [0, 7])
def test_memory_that_was_freed(left, gemm):
    a = gemm["a"].clone()
    moe_xe.grouped_gemm(**gemm | dict(a=a))
    a.untyped_storage().resize_(4 * left)
    with pytest.raises(ValueError, match=f"a must have memory for all of its elements.* on a storage of {4 * left} bytes"):
        moe_xe.grouped_gemm(**gemm | dict(a=a))


def test_out_is_looked_at(gemm, repeats):
    out = torch.empty(ROWS, N)
    for _ in range(2):
        assert moe_xe.grouped_gemm(**gemm, out=out) is out
    for _ in range(2):
        moe_xe.grouped_gemm(**gemm, out=torch.empty(ROWS, H)[:, :N])
    with pytest.raises(ValueError, match="out must not share memory with a"):
        moe_xe.grouped_gemm(**gemm, out=gemm["a"][:, :N])
    memory, before = torch.randn(ROWS, H + N), len(repeats)      # side by side in one matrix: no byte is shared
    arguments, rest = gemm | dict(a=memory[:, :H]), memory[:, H:]
    wanted = moe_xe.grouped_gemm(**arguments)
    for _ in range(2):
        assert torch.equal(moe_xe.grouped_gemm(**arguments, out=rest), wanted)
    assert len(repeats) == before
    with pytest.raises(ValueError, match="out must be float32"):
        moe_xe.grouped_gemm(**gemm, out=torch.empty(ROWS, N + 1))


def test_one_tensor_in_two_places():
    """Which of the two a launch reads cannot be told; nor may another call take them for one."""
    x = torch.randn(8, 8)
    for first, second in ((x, x), (x, torch.randn(8, 8)), (x, x), (torch.randn(8, 8), x)):
        got = grouped_outer(first, second, torch.tensor([8]))
        assert torch.allclose(got[0], first.T @ second, atol=1e-4)


def test_autograd_knows_what_was_written(gemm):
    out = torch.zeros(ROWS, N)
    versions = []
    for _ in range(3):
        moe_xe.grouped_gemm(**gemm, out=out)
        versions.append(out._version)
    assert versions == [1, 2, 3]
    with torch.inference_mode():
        own = torch.zeros(ROWS, N)
        for _ in range(3):
            assert torch.equal(moe_xe.grouped_gemm(**gemm, out=own), out)


# ------------------------------------------------------------------------------------------------- other surroundings

def test_gradients(gemm, repeats):
    """Asked for after calls without; and not where none is wanted."""
    weights = torch.nn.Parameter(gemm["w"])
    with torch.no_grad():
        plain = moe_xe.grouped_gemm(**gemm | dict(w=weights))
    assert len(repeats) == 1 and not plain.requires_grad
    out = moe_xe.grouped_gemm(**gemm | dict(w=weights))
    assert torch.equal(out, plain) and out.requires_grad
    out.sum().backward()
    assert weights.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="out must be left out where a gradient is asked for"):
        moe_xe.grouped_gemm(**gemm | dict(w=weights), out=torch.empty(ROWS, N))
    with torch.inference_mode():
        before = len(repeats)
        assert torch.equal(moe_xe.grouped_gemm(**gemm), plain) and len(repeats) == before + 1


def test_autocast(gemm):
    with torch.autocast("cpu", torch.bfloat16):
        assert moe_xe.grouped_gemm(**gemm).dtype == torch.bfloat16
    assert moe_xe.grouped_gemm(**gemm).dtype == torch.float32


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_op(gemm):
    with Watching() as watching:
        moe_xe.grouped_gemm(**gemm)
    assert watching.seen == [torch.ops.moe_xe.grouped_gemm.default]


def test_a_function_mode_sees_the_op(gemm, repeats):
    seen = []

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Functions():
        moe_xe.grouped_gemm(**gemm)
    assert any("moe_xe" in str(func) for func in seen)
    with torch.device("meta"):      # a mode, too, but of what has no device
        assert moe_xe.grouped_gemm(**gemm).device.type == "cpu"


def test_a_profiler_sees_the_op(gemm):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        moe_xe.grouped_gemm(**gemm)
    assert "moe_xe::grouped_gemm" in {event.key for event in profile.key_averages()}


def test_fake_tensors_and_tracing(gemm):
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in gemm.items()}
        assert type(moe_xe.grouped_gemm(**fake)) is not torch.Tensor
        with pytest.raises(TypeError, match="all tensors must be fake or none"):
            moe_xe.grouped_gemm(**gemm)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda a: moe_xe.grouped_gemm(**gemm | dict(a=a)))(gemm["a"])
    assert torch.ops.moe_xe.grouped_gemm.default in {node.target for node in traced.graph.nodes}
    compiled = torch.compile(lambda **arguments: moe_xe.grouped_gemm(**arguments), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**gemm), moe_xe.grouped_gemm(**gemm))


def test_transforms(gemm):
    with pytest.raises(TypeError, match="inside torch.func.grad"):
        torch.func.grad(lambda a: moe_xe.grouped_gemm(**gemm | dict(a=a)).sum())(gemm["a"])
    several = torch.stack([gemm["a"], gemm["a"] * 2])
    got = torch.vmap(lambda a: moe_xe.grouped_gemm(**gemm | dict(a=a)))(several)
    assert torch.equal(got, torch.stack([moe_xe.grouped_gemm(**gemm | dict(a=a)) for a in several]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(gemm["a"], torch.ones_like(gemm["a"]))
        with pytest.raises(TypeError, match="forward-mode tangent"):
            moe_xe.grouped_gemm(**gemm | dict(a=dual))


def test_subclasses(gemm):
    seen = []

    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    assert type(moe_xe.grouped_gemm(**gemm | dict(a=gemm["a"].as_subclass(Named)))) is Named
    assert any("moe_xe" in str(func) for func in seen)


def test_uninitialised_memory_is_filled_where_torch_does_so(gemm, repeats):
    counts = torch.zeros(E, dtype=torch.int64)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            assert moe_xe.grouped_gemm(**gemm | dict(tokens_per_expert=counts)).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(repeats) == 2


@pytest.mark.cpu_device
def test_environment_and_precision(gemm, monkeypatch, launched):
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.delenv("MOE_XE_PRINT_CONFIG")
    moe_xe.grouped_gemm(**gemm)
    known = len(known_calls())
    torch.set_float32_matmul_precision("high")
    try:
        moe_xe.grouped_gemm(**gemm)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(known_calls()) == known + 2
    monkeypatch.setenv("MOE_XE_CPU_ISA", "baseline")
    moe_xe.grouped_gemm(**gemm)
    assert len(known_calls()) == known + 4
    monkeypatch.setenv("MOE_XE_CPU_ISA", "avx9")
    with pytest.raises(ValueError, match="MOE_XE_CPU_ISA must be one of"):
        moe_xe.grouped_gemm(**gemm)
    monkeypatch.setenv("MOE_XE_CPU_ISA", "baseline")
    monkeypatch.setenv("MOE_XE_PRINT_CONFIG", "1")
    moe_xe.grouped_gemm(**gemm)
    assert [line.origin for line in launched()] == ["chosen"]


def test_a_forced_configuration(gemm, monkeypatch, launched):
    with force_config(GENERIC):
        moe_xe.grouped_gemm(**gemm)
        assert [(line.origin, line.config) for line in launched()] == [("forced", str(GENERIC))]
        monkeypatch.setenv("MOE_XE_PRINT_CONFIG", "0")
        kernels = [known.repeat.kernels for known in (known_of(gemm), known_of(gemm))]
    assert kernels[0] == kernels[1] != known_of(gemm).repeat.kernels


def known_of(arguments: dict) -> Known:
    moe_xe.grouped_gemm(**arguments)
    return list(known_calls()._known.values())[-1]


@pytest.mark.cpu_device
def test_a_given_configuration_and_the_tuners(gemm, repeats):
    for _ in range(2):
        moe_xe.grouped_gemm(**gemm, config=tile(98))
        with pytest.raises(ValueError, match="config must be None with autotune=True"):
            moe_xe.grouped_gemm(**gemm, config=tile(98), autotune=True)
    assert len(repeats) == 1
    with pytest.raises(ValueError, match="schedule must be left out"):
        moe_xe.grouped_gemm(**gemm, config=tile(98), schedule="static")
    with pytest.raises(ValueError, match="config does not fit"):
        moe_xe.grouped_gemm(**gemm, config=GENERIC)


def test_autotune_asks_the_tuner_each_time(gemm, repeats, fresh_tuner, monkeypatch):
    asked = []
    monkeypatch.setattr(fresh_tuner, "config_for", lambda key, default, *rest: asked.append(key) or default)
    for _ in range(3):
        moe_xe.grouped_gemm(**gemm, autotune=True)
    assert len(asked) == 3 and not repeats


@pytest.mark.cpu_device
def test_another_queue(gemm, repeats, monkeypatch):
    """It runs on the queue that is chosen then, be it of the same context or of another."""
    used, run = [], Repeat.run
    monkeypatch.setattr(Repeat, "run", lambda self, queue, addresses: used.append(queue) or run(self, queue, addresses))
    wanted = moe_xe.grouped_gemm(**gemm)
    queue = Queue.create("cpu")
    with on_queue(queue):
        assert torch.equal(moe_xe.grouped_gemm(**gemm), wanted)
    assert len(used) == 2 and used[1] is queue and used[0] is not queue
    elsewhere = [known._replace(repeat=replace(known.repeat, place=(0, 0))) for known in known_calls()._known.values()]
    for key, known in zip(list(known_calls()._known), elsewhere):
        known_calls().put(key, known)
    assert torch.equal(moe_xe.grouped_gemm(**gemm), wanted) and len(used) == 2      # of another context: planned again
    assert torch.equal(moe_xe.grouped_gemm(**gemm), wanted) and len(used) == 3


def test_zeros(device, monkeypatch):
    """On xpu they are written in order of the launches' queue, which may not be torch's stream."""
    device = torch.device(device)
    torch.full((5,), 7, dtype=torch.int32, device=device)      # whose memory may come again
    queue = queue_for(device)
    if device.type == "xpu":
        monkeypatch.setattr(torch, "zeros", None)
    words = Submission(queue, device).zeros(5)
    queue.wait()
    assert words.cpu().tolist() == [0] * 5


# ------------------------------------------------------------------------------------------------- threads, limits, failures

def test_threads(repeats):
    """Each its own tensors and sizes, again and again, while calls leave."""
    known_calls()

    def work(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            rows = int(torch.randint(1, 5, (), generator=generator))
            a, w = torch.randn(rows, H, generator=generator), torch.randn(2, N, H, generator=generator)
            out = moe_xe.grouped_gemm(a, w, torch.tensor([rows, 0]))
            if not torch.allclose(out, a @ w[0].T, atol=1e-4):
                return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert len(repeats) > 100


def test_limits(gemm):
    repeat = known_of(gemm).repeat

    def known(*kernels: object) -> Known:
        return Known(replace(repeat, kernels=frozenset(kernels)), (), (), lambda *_: None)

    calls = Calls(most_kernels=3, most=4)
    for number in range(6):
        calls.put(number, known("one"))
    assert [number for number in range(6) if calls.get(number)] == [2, 3, 4, 5]
    assert calls.get(2)
    calls.put(6, known("one", "two", "three"))
    assert [number for number in range(7) if calls.get(number)] == [2, 4, 5, 6]
    calls.put(7, known("four"))      # the one kernel of the oldest is used by others, too
    assert [number for number in range(8) if calls.get(number)] == [7]
    calls.put(7, known("five"))
    calls.clear()
    assert not len(calls) and not calls._kernels


def test_a_failed_call_is_not_remembered(gemm, monkeypatch):
    known_calls().clear()
    submit = launch_module._submit

    def failing(*arguments):
        submit(*arguments)
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(launch_module, "_submit", failing)
        with pytest.raises(RuntimeError, match="broken"):
            moe_xe.grouped_gemm(**gemm)
    assert not len(known_calls())
    moe_xe.grouped_gemm(**gemm)
    assert len(known_calls()) == 2


def test_memory_from_elsewhere_is_not_remembered():
    """A launch that uses memory which is neither the call's nor the submission's."""
    queue, device = calls_module.queue_for(torch.device("cpu")), torch.device("cpu")
    call = launch_module.Call(**{name: value for name, value in zip(("a", "w", "rows"), gemm_arguments().values())}, total_rows=ROWS)
    own, others = (torch.empty(ROWS, N) for _ in range(2))
    for out, is_known in ((own, True), (others, False)):
        with Submission(queue, device) as submission:
            launch_module.launch(submission, call, out)
        assert (submission.repeat([call.a, call.w, call.rows, own], [False] * 3 + [True], []) is not None) == is_known


def test_the_blocks_launches_are_waited_for_once(monkeypatch):
    case = every_op()["fused_moe"]
    case()
    waits, wait = [], Queue.wait
    monkeypatch.setattr(Queue, "wait", lambda queue: waits.append(threading.get_ident()) or wait(queue))
    known_calls().clear()
    case()
    assert len(waits) == 1
    case()
    assert len(waits) == 1      # the runtime's own, in the sequence


@pytest.mark.parametrize("one_launch", [pytest.param(True, marks=pytest.mark.full), False])
def test_what_launches_use_lives_until_they_are_waited_for(one_launch, monkeypatch):
    """Here the factors of a shared expert that becomes two, which are copied for it."""
    case = every_op()["fused_moe"]
    arguments = {name: value for name, value in case.arguments.items() if name not in ("out", "workspace")}
    size, hidden = arguments["w2"].shape[2], arguments["w2"].shape[1]
    arguments["shared"] = moe_xe.SharedExpert(torch.randn(2 * size, hidden), torch.randn(hidden, 2 * size), torch.randn(2 * size, hidden),
                                              torch.rand(len(arguments["topk_ids"])))
    arguments["fusions"] = moe_xe.Fusions(launches=one_launch)
    factors, alive, make, wait = [], [], stages.Routing, Queue.wait

    def routing_of(*values):
        routing = make(*values)
        factors.append(weakref.ref(routing.shared_weights))
        return routing

    monkeypatch.setattr(stages, "Routing", routing_of)
    monkeypatch.setattr(Queue, "wait", lambda queue: alive.append(factors[0]() is not None) or wait(queue))
    first = moe_xe.fused_moe(**arguments)
    assert alive == [True] and factors[0]() is None
    assert torch.equal(first, moe_xe.fused_moe(**arguments)) and len(alive) == 2      # which no other call can use again
