"""What is wrong is said on every rank, and none waits."""
from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_xe import SharedExpert
from moe_xe.distributed import dispatch, expert_parallel_moe, trips
from moe_xe.distributed.agreement import _states
from tests.distributed.case import block, of_rank
from tests.distributed.processes import ranks

TOKENS, EXPERTS = (9, 0, 5, 3), (3, 1, 2, 1)


def on_rank(rank, arguments, changed: dict, options: dict, experts=EXPERTS):
    """changed: of one rank or all, arguments by name."""
    own = of_rank(arguments, rank, TOKENS, experts) | changed.get(rank, {}) | changed.get("all", {})
    gradients = own.pop("gradients", True)
    for name in own.pop("require", ()):
        own[name].requires_grad_()
    with torch.set_grad_enabled(gradients):
        return expert_parallel_moe(**own, group=dist.group.WORLD, **options)


def works(rank, arguments):
    out = on_rank(rank, arguments, {}, {})
    return out.isfinite().all().item() and out.shape[0] == TOKENS[rank]


def outcomes(changed: dict, **options) -> list:
    """Of each rank. And the next call works."""
    arguments = block(TOKENS, EXPERTS)
    found = ranks(4).outcomes(on_rank, arguments, changed, options)
    assert ranks(4).run(works, arguments) == [True] * 4
    return found


def make_x(tokens: int, hidden: int = 50, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(tokens, hidden, dtype=dtype)


@pytest.mark.parametrize("changed, error, message", [
    ({"hidden_states": make_x(5, 49)}, ValueError, "hidden_states and w13 must agree in H"),
    ({"topk_weights": None}, TypeError, "topk_weights must be a torch.Tensor"),
    ({"hidden_states": "x"}, TypeError, "hidden_states must be a torch.Tensor"),
    ({"hidden_states": torch.empty(5, 50, device="meta")}, ValueError, "hidden_states must be on a device of the group"),
    ({"w2": torch.empty(2, 50, 37, device="meta")}, ValueError, "all tensors must be on one device"),
    ({"activation": "tanh"}, ValueError, "activation must be one of"),
    ({"expert_map": None}, TypeError, "expert_parallel_moe takes .* but expert_map, got expert_map"),
    ({"chunks": 0}, ValueError, "chunks must be from 1 to"),
    ({"shared": SharedExpert(make_x(3), make_x(50, 3))}, ValueError, "shared.gate_proj must be given"),
    ({"experts_of_ranks": [1, 2, 3, 1]}, ValueError, "w13 must have the 3 experts that experts_of_ranks gives rank 2, got 2"),
    ({"wire": "int4"}, ValueError, "wire and wire_back must be None, 'int8' or 'fp8_e4m3', got 'int4'"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_a_wrong_argument_of_one_rank(changed, error, message):
    found = outcomes({2: changed})
    with pytest.raises(error, match=message):
        raise found[2]
    for rank in (0, 1, 3):
        assert isinstance(found[rank], RuntimeError), found[rank]
        assert str(found[rank]).startswith(f"rank 2 of the group has an error: {error.__name__}: {str(found[2])[:100]}")


@pytest.mark.parametrize("changed, message", [
    ({1: {"hidden_states": make_x(0, 48), "w13": make_x(74, 48)[None], "w2": make_x(48, 37)[None]}},
     "H must be the same on all ranks of the group, got 50 on ranks 0, 2, 3; 48 on rank 1"),
    ({rank: {"topk_ids": torch.zeros(TOKENS[rank], 2).int(), "topk_weights": torch.ones(TOKENS[rank], 2)} for rank in (0, 3)},
     "top_k must be the same on all ranks of the group, got 2 on ranks 0, 3; 3 on ranks 1, 2"),
    ({2: {"wire": "int8"}}, "wire must be the same on all ranks of the group, got None on ranks 0, 1, 3; int8 on rank 2"),
    ({0: {"wire_back": "fp8_e4m3"}}, "wire_back must be the same .* got fp8_e4m3 on rank 0; None on ranks 1, 2, 3"),
    ({3: {"experts_of_ranks": EXPERTS}}, "experts_of_ranks must be the same on all ranks of the group"),
    ({3: {"gradients": False}, "all": {"require": ["w13"]}},
     r"whether gradients are asked for .* got True on ranks 0, 1, 2; False on rank 3"),
    ({0: {"topk_ids": torch.full((9, 3), 8, dtype=torch.int32)}, 2: {"topk_ids": torch.full((5, 3), -2)}},
     r"topk_ids must lie in \[0, 7\), or be -1 or 7 for no expert, but 42 on ranks 0, 2 do not"),
], ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value)))
def test_what_ranks_differ_in(changed, message):
    for outcome in outcomes(changed):
        with pytest.raises(ValueError, match=message):
            raise outcome


def test_dtypes_differ():
    arguments = block(TOKENS, EXPERTS)
    changed = {0: {name: of_rank(arguments, 0, TOKENS, EXPERTS)[name].half() for name in ("hidden_states", "w13", "w2")}}
    for outcome in outcomes(changed):
        with pytest.raises(ValueError, match="dtype must be the same .* got torch.float16 on rank 0; torch.float32 on ranks 1, 2, 3"):
            raise outcome


def sort_fails(rank, arguments):
    """On rank 1, behind all checks."""
    def fail(*_):
        raise MemoryError("no memory is left")

    original = trips.sort_tokens
    try:
        trips.sort_tokens = fail if rank == 1 else original
        return works(rank, arguments)
    finally:
        trips.sort_tokens = original


def test_a_rank_that_fails_behind_its_checks():
    arguments = block(TOKENS, EXPERTS)
    for rank, outcome in enumerate(ranks(4).outcomes(sort_fails, arguments)):
        error, message = ((MemoryError, "^no memory is left") if rank == 1 else
                          (RuntimeError, "^rank 1 of the group has an error: MemoryError: no memory is left"))
        with pytest.raises(error, match=message):
            raise outcome
    assert ranks(4).run(works, arguments) == [True] * 4


def messages(rank, arguments, experts, times, chunks):
    """The lengths of the messages of some calls, the first ones of these groups; None before each call."""
    _states.clear()
    sent, original = [], torch.ops._c10d_functional.all_gather_into_tensor
    torch.ops._c10d_functional.all_gather_into_tensor = lambda message, *rest: (sent.append(len(message)), original(message, *rest))[1]
    try:
        for _ in range(times):
            sent.append(None)
            on_rank(rank, arguments, {}, {"chunks": chunks[rank]}, experts)
    finally:
        torch.ops._c10d_functional.all_gather_into_tensor = original
    return sent


@pytest.mark.parametrize("experts, chunks", [((3, 1, 2, 1), (1,) * 4), ((2, 2, 2, 2), (1, 3, 1, 2))])
def test_one_message_a_call(experts, chunks):
    """But the first, if ranks have different numbers of experts, or say different numbers of chunks, which a rank cannot know."""
    for sent in ranks(4).run(messages, block(TOKENS, experts), experts, 3, chunks):
        assert sent == [None, 64, 64, None, 64, None, 64]


def dispatched(rank, num_experts, expand):
    x, ids = torch.randn(3, 8), torch.randint(num_experts, (3, 2))
    return len(dispatch(x, ids, torch.rand(3, 2), num_experts=num_experts, group=None, expand=expand).x)


def test_messages_grow():
    """More experts than fit in a first message; all ranks then have longer ones."""
    assert sum(ranks(4).run(dispatched, 300, True)) == 4 * 3 * 2
    assert sum(ranks(4).run(dispatched, 9, True)) == 4 * 3 * 2


def test_differing_numbers_of_experts():
    for outcome in ranks(4).outcomes(of_its_own_number):
        with pytest.raises(ValueError, match="num_experts must be the same .* got 8 on ranks 0, 1; 9 on ranks 2, 3"):
            raise outcome


def of_its_own_number(rank):
    dispatched(rank, 8 + rank // 2, False)


def test_without_a_group():
    with pytest.raises(ValueError, match="group must be initialised"):
        dispatch(torch.ones(1, 8), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), num_experts=1, group=None)


def errors_of_groups(rank):
    errors = []
    for group in (dist.new_group([0]), "gloo"):
        try:
            dispatch(torch.ones(1, 8), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), num_experts=1, group=group)
        except (TypeError, ValueError) as error:
            errors.append(str(error))
    return errors


def test_what_is_no_group():
    first, *others = ranks(4).run(errors_of_groups)
    no_group = "group must be a ProcessGroup or a DeviceMesh, got str"
    assert first == [no_group] and others == [["group must have this rank in it, got GroupMember.NON_GROUP_MEMBER", no_group]] * 3
