"""The token sort and the combine against torch: the CPU device's kernels, and the GPU's on the CPU device."""
from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_xe.device import queue_for
from moe_xe.ops.routing import token_sort
from moe_xe.ops.routing.token_sort import SortedTokens, check_routing, combine, launch_combine, launch_sort, sort_tokens
from moe_xe.ops.submission import Submission
from moe_xe.plan.launch import Target

pytestmark = pytest.mark.usefixtures("machines_instructions")

POISON = 777
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# what kernels are compiled for: top_k, num_shared, ids, weights, shared_weights, expert map
KINDS = [
    (1, 0, torch.int32, None, None, False),
    (2, 0, torch.int64, BF16, None, False),
    (3, 1, torch.int32, F16, None, True),
    (8, 0, torch.int32, F32, None, False),
    (10, 2, torch.int64, F32, BF16, True),
]


@pytest.fixture(params=["own", "gpu"])
def kernels(request, monkeypatch, device):
    """The device's own kernels, and the GPU's wherever the tensors are."""
    if request.param == "gpu":
        if device.type != "cpu":
            pytest.skip("these are the device's own kernels")
        monkeypatch.setattr(token_sort, "target_of", lambda facts: Target(is_cpu=False, cores=4, has_dpas=False))
    return request.param


def strided(values: torch.Tensor, gap: int) -> torch.Tensor:
    """The same rows, further apart; poison between them."""
    whole = torch.full((values.shape[0], values.shape[1] + gap), POISON, dtype=values.dtype, device=values.device)
    view = whole[:, :values.shape[1]]
    return view.copy_(values)


def make_routing(kind, num_tokens: int, num_experts: int, *, gap: int = 0, dropped: float = 0.2, distinct: bool = False,
                 scaling: float = 2.5, device="cpu") -> token_sort.Routing:
    """Random ids; some are sentinels: -1, num_experts and far outside, or what the map leaves out."""
    top_k, num_shared, id_dtype, weights, shared_weights, mapped = kind
    known = 2 * num_experts + 1 if mapped else num_experts
    ids = torch.randint(known, (num_tokens, top_k))
    if distinct and num_tokens:
        ids = torch.stack([torch.randperm(max(known, top_k))[:top_k] for _ in range(num_tokens)])
    far = 2**31 - 1 if id_dtype == torch.int32 else 2**40 + 1
    outside = torch.tensor([-1, known, far, -far - 1])[torch.randint(4, ids.shape)]
    ids = torch.where(torch.rand(ids.shape) < dropped, outside, ids).to(id_dtype)
    expert_map = None
    if mapped:
        expert_map = torch.full((known,), -1, dtype=torch.int32)
        expert_map[torch.randperm(known)[:num_experts]] = torch.randperm(num_experts).int()
        expert_map[0] = num_experts     # outside too
    rows = lambda dtype, columns: None if dtype is None else strided(torch.rand(num_tokens, columns).to(dtype), gap).to(device)
    return check_routing(
        strided(ids, gap).to(device), num_experts, topk_weights=rows(weights, top_k), num_shared=num_shared,
        shared_weights=rows(shared_weights, num_shared), routed_scaling_factor=scaling,
        expert_map=None if expert_map is None else expert_map.to(device))


def local_experts(routing) -> torch.Tensor:
    """[T, top_k] local ids; num_experts where a pair is dropped."""
    local = routing.topk_ids.cpu().long()
    if routing.expert_map is not None:
        known = len(routing.expert_map)
        inside = (local >= 0) & (local < known)
        local = torch.where(inside, routing.expert_map.cpu().long()[local.clamp(0, known - 1)], -1)
    return torch.where((local >= 0) & (local < routing.num_experts), local, routing.num_experts)


def reference_sort(routing) -> SortedTokens:
    tokens, top_k, shared = routing.num_tokens, routing.top_k, routing.num_shared
    pairs = torch.arange(routing.num_pairs).view(tokens, top_k + shared)
    group = torch.cat([local_experts(routing) + shared, torch.arange(shared).expand(tokens, shared)], 1)
    weight = torch.ones(tokens, top_k) if routing.topk_weights is None else routing.topk_weights.cpu().float()
    extra = torch.ones(tokens, shared) if routing.shared_weights is None else routing.shared_weights.cpu().float()
    scales = torch.cat([weight * torch.tensor(routing.routed_scaling_factor), extra], 1)
    counts = torch.bincount(group.flatten(), minlength=shared + routing.num_experts + 1)[:-1]
    order = torch.argsort(group.flatten(), stable=True)[:counts.sum()]
    unused = routing.num_pairs - len(order)
    row_pairs = torch.cat([pairs.flatten()[order], torch.full((unused,), -1)])
    return SortedTokens(counts.int(), row_pairs.int(), torch.cat([scales.flatten()[order], torch.zeros(unused)]))


def run_sort(routing, num_queue_words: int = 3, zero_dropped: torch.Tensor | None = None) -> SortedTokens:
    """launch_sort into poisoned memory, with poison between the outputs that must stay."""
    device, guard = routing.topk_ids.device, 5
    sizes = [routing.num_shared + routing.num_experts, routing.num_pairs, routing.num_pairs, num_queue_words]
    memory = torch.full((sum(sizes) + guard * (len(sizes) + 1),), POISON, dtype=torch.int32, device=device)
    begins = [guard * (i + 1) + sum(sizes[:i]) for i in range(len(sizes))]
    parts = [memory[begin:begin + size] for begin, size in zip(begins, sizes)]
    queue = queue_for(device)
    launch_sort(Submission(queue, device), routing, tokens_per_expert=parts[0].data_ptr(), row_pairs=parts[1].data_ptr(),
                row_scales=parts[2].data_ptr(), queue_words=parts[3].data_ptr(), num_queue_words=num_queue_words,
                zero_dropped=zero_dropped)
    queue.wait()
    outside = torch.ones(len(memory), dtype=torch.bool)
    for begin, size in zip(begins, sizes):
        outside[begin:begin + size] = False
    assert (memory.cpu()[outside] == POISON).all(), "written outside the outputs"
    assert (parts[3] == 0).all()
    return SortedTokens(parts[0].cpu(), parts[1].cpu(), parts[2].view(torch.float32).cpu())


def check_sort(routing) -> None:
    for got, wanted, name in zip(run_sort(routing), reference_sort(routing), SortedTokens._fields):
        assert torch.equal(got, wanted), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_tokens=st.integers(0, 1200), num_experts=st.integers(1, 600), gap=st.integers(0, 3),
       dropped=st.sampled_from([0.0, 0.3, 1.0]), distinct=st.booleans())
def test_sort(kind, kernels, device, num_tokens, num_experts, gap, dropped, distinct):
    check_sort(make_routing(kind, num_tokens, num_experts, gap=gap, dropped=dropped, distinct=distinct, device=device))


@pytest.mark.few(2)
@pytest.mark.parametrize("top_k", range(4, 8))
def test_other_top_k(top_k, device):
    check_sort(make_routing((top_k, 0, torch.int64, F16, None, False), 77, 13, device=device))


def test_many_experts(kernels, device):
    check_sort(make_routing(KINDS[3], 600, 1500, device=device))


def test_prefill(device):
    check_sort(make_routing(KINDS[3], 8192, 128, dropped=0.01, device=device))


def test_more_than_a_word_of_slots(kernels, device):
    check_sort(make_routing((40, 0, torch.int32, F32, None, False), 50, 48, distinct=True, device=device))


def test_sort_is_repeatable(device):
    routing = make_routing(KINDS[4], 500, 60, device=device)
    for first, second in zip(run_sort(routing), run_sort(routing)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype, columns, gap", [(BF16, 5, 0), (F32, 7, 1), pytest.param(BF16, 24, 8, marks=pytest.mark.full)])
def test_rows_of_dropped_tokens_become_zero(kernels, dtype, columns, gap, device):
    routing = make_routing(KINDS[0], 333, 9, dropped=0.4, device=device)
    whole = torch.full((333, columns + gap), POISON, dtype=dtype, device=device)
    before = whole.clone()
    run_sort(routing, zero_dropped=whole[:, :columns])
    gone = (local_experts(routing)[:, 0] == routing.num_experts).to(device)
    before[:, :columns][gone] = 0
    assert gone.any() and torch.equal(whole, before)


def test_zero_dropped_is_for_one_slot():
    routing = make_routing(KINDS[1], 4, 3)
    with pytest.raises(ValueError, match="zero_dropped is for one slot a token, got 2"):
        run_sort(routing, zero_dropped=torch.empty(4, 8))


def reference_combine(y, routing, out_dtype) -> torch.Tensor:
    """Summed in float32, slot after slot."""
    slots = routing.top_k + routing.num_shared
    rows = y.cpu().float().view(routing.num_tokens, slots, y.shape[1])
    valid = torch.cat([local_experts(routing) < routing.num_experts, torch.ones(routing.num_tokens, routing.num_shared) > 0], 1)
    total = torch.zeros(routing.num_tokens, y.shape[1])
    for slot in range(slots):
        total += torch.where(valid[:, slot, None], rows[:, slot], 0)
    return total.to(out_dtype)


def make_rows(routing, hidden_size: int, dtype, device) -> torch.Tensor:
    """Random rows; those of dropped pairs are NaN."""
    y = torch.randn(routing.num_pairs, hidden_size)
    dropped = torch.zeros(routing.num_tokens, routing.top_k + routing.num_shared, dtype=torch.bool)
    dropped[:, :routing.top_k] = local_experts(routing) == routing.num_experts
    y[dropped.flatten()] = float("nan")
    return y.to(dtype).to(device)


def check_combine(kind, num_tokens, hidden_size, dtype, out_dtype, *, gap=0, dropped=0.3, device="cpu") -> None:
    """launch_combine into poisoned rows; what lies between them must stay."""
    routing = make_routing(kind, num_tokens, 11, gap=gap, dropped=dropped, device=device)
    y = make_rows(routing, hidden_size, dtype, device)
    wide = strided(y, gap)
    whole = torch.full((num_tokens, hidden_size + gap), POISON, dtype=out_dtype, device=device)
    queue = queue_for(whole.device)
    launch_combine(Submission(queue, whole.device), routing, wide, whole[:, :hidden_size])
    queue.wait()
    assert torch.equal(whole[:, :hidden_size].cpu(), reference_combine(y, routing, out_dtype))
    assert (whole[:, hidden_size:] == POISON).all()


# whole and partial vectors, one and several work-groups a token
@pytest.mark.parametrize("hidden_size, kind, dtype, out_dtype", [
    (1100, KINDS[1], F32, BF16), (333, KINDS[4], BF16, F16), (4, KINDS[0], F16, F32), (64, KINDS[3], F32, F32)], ids=str)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_tokens=st.integers(0, 150), gap=st.sampled_from([0, 3, 4]), dropped=st.sampled_from([0.0, 0.3, 1.0]))
def test_combine(hidden_size, kind, dtype, out_dtype, kernels, device, num_tokens, gap, dropped):
    check_combine(kind, num_tokens, hidden_size, dtype, out_dtype, gap=gap, dropped=dropped, device=device)


@pytest.mark.cpu_device     # most of this memory is never touched
def test_combine_of_rows_beyond_two_to_the_31_elements(kernels, device):
    routing = make_routing((3, 0, torch.int32, None, None, False), 2, 11, dropped=0.0, device=device)
    stride = 2**29 - 8
    y = torch.empty(5 * stride + 1100, dtype=BF16).as_strided((6, 1100), (stride, 1))
    assert 5 * stride > 2**31
    y.copy_(torch.randn(6, 1100))
    out = torch.full((2, 1100), POISON, dtype=BF16)
    queue = queue_for(out.device)
    launch_combine(Submission(queue, out.device), routing, y, out)
    queue.wait()
    assert torch.equal(out, reference_combine(y, routing, BF16))


@pytest.mark.parametrize("dtype, out_dtype", [(F32, F16), (BF16, F16)], ids=str)
def test_combine_of_padded_rows(kernels, device, dtype, out_dtype):
    """Loads of whole vectors reach into the padding, which is not summed."""
    routing = make_routing(KINDS[4], 50, 11, dropped=0.3, device=device)
    y = make_rows(routing, 333, dtype, device)
    wide = torch.full((len(y), 336), float("nan"), dtype=dtype, device=device)
    wide[:, :333] = y
    out = torch.full((50, 334), POISON, dtype=out_dtype, device=device)
    queue = queue_for(out.device)
    launch_combine(Submission(queue, out.device), routing, wide, out[:, :333])
    queue.wait()
    assert torch.equal(out[:, :333].cpu(), reference_combine(y, routing, out_dtype)) and (out[:, 333] == POISON).all()


def test_combine_rounds_to_nearest_even_and_keeps_special_values(kernels, device):
    y = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, float("inf"), float("nan"), -0.0]], device=device)
    routing = check_routing(torch.zeros(1, 1, dtype=torch.int32, device=device), 1)
    out = torch.empty(1, 5, dtype=BF16, device=device)
    queue = queue_for(out.device)
    launch_combine(Submission(queue, out.device), routing, y, out)
    queue.wait()
    assert torch.equal(out[:, :3].cpu(), torch.tensor([[1.0, 1 + 2**-6, float("inf")]], dtype=BF16))
    assert out[0, 3].isnan() and out[0, 4] == 0


def arguments_of(routing) -> dict:
    names = ("topk_weights", "expert_map", "num_shared", "shared_weights", "routed_scaling_factor")
    return {name: getattr(routing, name) for name in names}


@pytest.mark.parametrize("kind", [pytest.param(KINDS[3], marks=pytest.mark.full), KINDS[4]], ids=str)
def test_public_functions(kind, device):
    routing = make_routing(kind, 100, 20, gap=1, device=device)
    for got, wanted in zip(sort_tokens(routing.topk_ids, 20, **arguments_of(routing)), reference_sort(routing)):
        assert torch.equal(got.cpu(), wanted)
    y = make_rows(routing, 50, BF16, device)
    placed = dict(expert_map=routing.expert_map, num_shared=routing.num_shared)
    assert torch.equal(combine(y, routing.topk_ids, 20, **placed).cpu(), reference_combine(y, routing, BF16))
    assert combine(y, routing.topk_ids, 20, out_dtype=F32, **placed).dtype == F32


def test_nothing(device):
    ids = torch.empty(0, 4, dtype=torch.int64, device=device)
    result = sort_tokens(ids, 6, num_shared=1)
    assert result.tokens_per_expert.tolist() == [0] * 7 and result.row_pairs.shape == result.row_scales.shape == (0,)
    assert combine(torch.empty(0, 8, device=device), ids, 6).shape == (0, 8)
    some = torch.zeros(3, 1, dtype=torch.int32, device=device)
    assert combine(torch.empty(3, 0, device=device), some, 6).shape == (3, 0)


@pytest.mark.parametrize("kind", [pytest.param(KINDS[1], marks=pytest.mark.full), KINDS[4]], ids=str)
def test_opcheck(kind, device):
    routing = make_routing(kind, 30, 7, device=device)
    given = arguments_of(routing)
    torch.library.opcheck(torch.ops.moe_xe.sort_tokens, (routing.topk_ids, 7, *given.values()))
    y = make_rows(routing, 50, BF16, device)
    torch.library.opcheck(torch.ops.moe_xe.combine, (y, routing.topk_ids, 7, routing.expert_map, routing.num_shared, BF16))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, backend, device):
    routing = make_routing(KINDS[1], 30, 7, device=device)
    y = make_rows(routing, 12, F32, device)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    def block(ids, weights, y):
        rows = sort_tokens(ids, 7, topk_weights=weights)
        return rows.row_pairs, combine(y, ids, 7)

    pairs, sums = block(routing.topk_ids, routing.topk_weights, y)
    assert torch.equal(pairs.cpu(), reference_sort(routing).row_pairs)
    assert torch.equal(sums.cpu(), reference_combine(y, routing, F32))


IDS = torch.tensor([[0, 1], [2, 0], [1, 2]])
WRONG_SORT = {
    "ids are a list": (dict(topk_ids=[[0]]), TypeError, r"topk_ids must be a torch.Tensor \[T, top_k\], got list"),
    "ids are 1D": (dict(topk_ids=IDS[0]), ValueError, r"topk_ids must have 2 dimensions \[T, top_k\], got int64\[2\]"),
    "ids are int16": (dict(topk_ids=IDS.short()), TypeError, "topk_ids must be int32 or int64, got torch.int16"),
    "no slots": (dict(topk_ids=IDS[:, :0]), ValueError, r"topk_ids must have 1 to 64 experts a token, got int64\[3, 0\]"),
    "too many slots": (dict(topk_ids=IDS.new_zeros(2, 65)), ValueError, r"1 to 64 experts a token, got int64\[2, 65\]"),
    "ids are a transposed view": (dict(topk_ids=IDS.T.contiguous().T), ValueError, "topk_ids's rows must be contiguous"),
    "no experts": (dict(num_experts=0), ValueError, "num_experts must be from 1 to 1048576, got 0"),
    "num_experts is a float": (dict(num_experts=3.0), TypeError, "num_experts must be an int, got float"),
    "num_shared is negative": (dict(num_shared=-1), ValueError, "num_shared must be from 0 to 1048576, got -1"),
    "too many pairs": (dict(topk_ids=IDS[:1].expand(1500, 2), num_shared=2**20), ValueError,
                       "tokens x slots must be at most 1073741824, got 1500 x 1048578"),
    "weights are too few": (dict(topk_weights=torch.rand(3, 1)), ValueError, r"topk_weights must be .* = \[3, 2\], got \[3, 1\]"),
    "weights are double": (dict(topk_weights=torch.rand(3, 2).double()), TypeError, "topk_weights must be bfloat16, float16 or float32"),
    "shared weights without shared experts": (dict(shared_weights=torch.rand(3, 1)), ValueError,
                                              r"shared_weights must be .* \[3, 0\], got \[3, 1\]"),
    "map is int64": (dict(expert_map=IDS[0]), TypeError, "expert_map must be int32, got torch.int64"),
    "map is empty": (dict(expert_map=IDS[0, :0].int()), ValueError, "expert_map must have at least one entry"),
    "factor is text": (dict(routed_scaling_factor="2"), TypeError, "routed_scaling_factor must be a number, got str"),
    "on two devices": (dict(topk_weights=torch.rand(3, 2, device="meta")), ValueError, "topk_ids is on cpu, topk_weights is on meta"),
}
WRONG_COMBINE = {
    "y is 3D": (dict(y=torch.rand(3, 2, 4)), ValueError, "y must have 2 dimensions"),
    "y is double": (dict(y=torch.rand(6, 4).double()), TypeError, "y must be bfloat16, float16 or float32, got torch.float64"),
    "y has too few rows": (dict(y=torch.rand(5, 4)), ValueError, r"y must have a row for each of the 3 x 2 pairs, got float32\[5, 4\]"),
    "y's rows are not contiguous": (dict(y=torch.rand(4, 6).T), ValueError, "y's rows must be contiguous"),
    "out_dtype is int": (dict(out_dtype=torch.int8), TypeError, "out_dtype must be bfloat16, float16 or float32, got torch.int8"),
    "y is elsewhere": (dict(y=torch.rand(6, 4, device="meta")), ValueError, "y is on meta, topk_ids is on cpu"),
}


@pytest.mark.parametrize("case", WRONG_SORT)
def test_bad_input_to_sort(case):
    changes, error, message = WRONG_SORT[case]
    with pytest.raises(error, match=message):
        sort_tokens(**dict(topk_ids=IDS, num_experts=3) | changes)


@pytest.mark.parametrize("case", WRONG_COMBINE)
def test_bad_input_to_combine(case):
    changes, error, message = WRONG_COMBINE[case]
    with pytest.raises(error, match=message):
        combine(**dict(y=torch.rand(6, 4), topk_ids=IDS, num_experts=3) | changes)


def test_misaligned_memory():
    ids = torch.frombuffer(bytearray(25), dtype=torch.int32, offset=1, count=6).view(3, 2)
    with pytest.raises(ValueError, match="topk_ids must be aligned to its 4-byte elements"):
        sort_tokens(ids, 3)
