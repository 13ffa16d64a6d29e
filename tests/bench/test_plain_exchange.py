"""torch's own expert parallelism, which ours is measured against, computes the block."""
import pytest
import torch
import torch.distributed as dist

from moe_xe.bench import plain_exchange
from moe_xe.bench.expert_parallel import PARTS, Options, run_model
from moe_xe.bench.workloads import Model
from tests.distributed.processes import ranks


def block(rank, x, w13, w2, weights, ids):
    group, local = dist.group.WORLD, w13.shape[0] // 2
    mine, own = slice(rank, None, 2), slice(local * rank, local * rank + local)
    found = plain_exchange.dispatch(x[mine], ids[mine], w13.shape[0], group)
    y = plain_exchange.experts(found.rows, w13[own], w2[own], found.tokens_per_expert)
    return plain_exchange.combine(y, found, weights[mine], group)


@pytest.mark.parametrize("tokens", [11, 1])
def test_plain(tokens):
    hidden, intermediate, num_experts = 16, 24, 6
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, 3)
    w13, w2 = torch.randn(num_experts, 2 * intermediate, hidden), torch.randn(num_experts, hidden, intermediate)
    ids = torch.rand(tokens, num_experts).topk(3, dim=1).indices
    found = ranks(2).run(block, x, w13, w2, weights, ids)
    for token in range(tokens):
        expected = 0
        for weight, expert in zip(weights[token], ids[token]):
            gate, up = (w13[expert] @ x[token]).chunk(2)
            expected = expected + weight * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(found[token % 2][token // 2], expected, rtol=1e-4, atol=1e-3)


def measured(rank, wrong, options):
    model = Model("tiny", 32, 16, 6, 2)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        if wrong:
            right = plain_exchange.experts
            patch.setattr(plain_exchange, "experts", lambda *arguments: 1.1 * right(*arguments))
        return [result.as_dict() for result in run_model(model, [5, 9], Options(2, rounds=2, **options), torch.device("cpu"))]


@pytest.mark.parametrize("wrong, options", [(False, ("fp32", None)), (False, ("bf16", "int8")), (True, ("fp32", None)), (True, ("bf16", "int8"))])
def test_cases(wrong, options):
    dtype, wire = options
    first, second = ranks(2).run(measured, wrong, {"dtype": dtype, "wire": wire, "wire_back": wire})
    assert first == second and [result["tokens"] for result in first] == [5, 9]
    for result in first:
        assert result["correct"] is not wrong
        assert set(result["moe_xe_ms"]) == set(result["plain_ms"]) == set(result["speedup"]) == set(PARTS)
        assert all(result["plain_ms"][part] / result["moe_xe_ms"][part] == result["speedup"][part] > 0 for part in PARTS)
        assert 0 < result["sent_bytes"] and 0 < result["plain_sent_bytes"]
    if not wrong and wire is None:
        slow, = ranks(2).run(measured, False, {"dtype": dtype, "delay": 20_000.0})[:1]
        sent = slow[1]["sent_bytes"] / 2
        assert slow[1]["moe_xe_ms"]["block"] > 0.5 * sent * 0.02
