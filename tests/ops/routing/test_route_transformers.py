"""route against the routers of transformers' models."""
import importlib
from types import SimpleNamespace

import pytest
import torch

from moe_xe.ops.routing.route import route

pytest.importorskip("transformers", minversion="5.0")

GROUPED = dict(n_group=4, topk_group=2)
MODELS = [      # module, router, configuration beyond the shared one, and route's options
    ("qwen3_moe", "Qwen3MoeTopKRouter", {}, dict(renormalize=True)),
    ("qwen3_moe", "Qwen3MoeTopKRouter", dict(norm_topk_prob=False), {}),
    ("mixtral", "MixtralTopKRouter", {}, dict(renormalize=True)),
    ("gpt_oss", "GptOssTopKRouter", {}, dict(scoring="topk_softmax")),
    ("deepseek_v2", "DeepseekV2TopkRouter", dict(GROUPED, topk_method="group_limited_greedy"),
     dict(num_groups=4, topk_groups=2, group_score="max", scaling_factor=2.5)),
    ("deepseek_v2", "DeepseekV2TopkRouter", dict(GROUPED, topk_method="greedy"), dict(scaling_factor=2.5)),
    ("deepseek_v3", "DeepseekV3TopkRouter", GROUPED,
     dict(scoring="sigmoid", num_groups=4, topk_groups=2, renormalize=True, scaling_factor=2.5)),
    ("glm4_moe", "Glm4MoeTopkRouter", dict(n_group=1, topk_group=1),
     dict(scoring="sigmoid", renormalize=True, scaling_factor=2.5)),
    ("deepseek_v4", "DeepseekV4TopKRouter", dict(scoring_func="sqrtsoftplus"),
     dict(scoring="sqrtsoftplus", renormalize=True, scaling_factor=2.5)),
]


def made(module, name, differences, top_k=6):
    config = SimpleNamespace(**{**dict(
        hidden_size=24, num_experts=48, num_local_experts=48, num_experts_per_tok=top_k, norm_topk_prob=True,
        routed_scaling_factor=2.5, router_jitter_noise=0), **differences})
    router = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)(config)
    with torch.no_grad():
        for tensor in [*router.parameters(), *router.buffers()]:
            tensor.normal_()
    return router


@pytest.mark.parametrize("module, name, differences, options", MODELS)
def test_agrees(module, name, differences, options, device):
    router = made(module, name, differences).to(device)
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(150, 24, device=device))
    got_weights, got_ids = route(logits, 6, correction_bias=getattr(router, "e_score_correction_bias", None), **options)
    ids, order = ids.sort(-1)
    got_ids, got_order = got_ids.sort(-1)
    same = (ids == got_ids).all(-1)
    assert same.float().mean() > 0.97       # near ties of scores rounded otherwise
    got_weights, weights = got_weights.gather(-1, got_order), weights.gather(-1, order)
    torch.testing.assert_close(got_weights[same], weights[same], rtol=1e-5, atol=1e-7)


def test_llama4(device):
    router = made("llama4", "Llama4Router", {}, top_k=1).to(device)
    with torch.no_grad():
        scores, logits = router(torch.randn(150, 24, device=device))
    weights, ids = route(logits, 1, scoring="sigmoid", ids_dtype=torch.int64)
    torch.testing.assert_close(torch.zeros_like(scores).scatter(1, ids, weights), scores)
