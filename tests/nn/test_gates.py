"""The recognised gate is that of the experts as they are now, whatever was changed since it was recognised."""
from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from moe_xe.nn import LoraExperts, gates
from moe_xe.nn.gates import fused_activation

pytest.importorskip("transformers", minversion="5.23")

from tests.integrations.test_transformers import GPT_OSS, HIDDEN, NEMOTRON, ODD_SIZES, QWEN3, _experts, _routing  # noqa: E402


class Scaled:
    """An activation that is no module."""

    def __init__(self, function, scale=1.0):
        self.function, self.scale = function, scale

    def __call__(self, x):
        return self.function(x) * self.scale


class ScaledModule(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return nn.functional.relu(x).square() * self.scale


def _set(**attributes):
    def change(experts):
        for name, value in attributes.items():
            experts._modules.pop(name, None)
            setattr(experts, name, copy.deepcopy(value))
    return change


def _set_inside(**attributes):
    return lambda experts: vars(experts.act_fn).update(attributes)


def _hook(experts):
    experts.act_fn.register_forward_hook(lambda module, args, output: output * 2)


def _gate(experts):
    experts._apply_gate = lambda x: type(experts)._apply_gate(experts, x).clamp(max=0.1)


# each after the one before it
CHANGES = {
    "limit and alpha": (GPT_OSS, [_set(limit=0.7), _set(alpha=1.1), _gate]),
    "act_fn": (QWEN3, [_set(act_fn=nn.GELU()), _set(act_fn=nn.Mish()), _set(act_fn=nn.functional.gelu), _set(act_fn=nn.SiLU())]),
    "inside act_fn": (NEMOTRON, [_set(act_fn=ScaledModule()), _set_inside(scale=2.0), _set_inside(scale=3.0), _set_inside(scale=1.0), _hook]),
    "inside an object": (QWEN3, [_set(act_fn=Scaled(nn.functional.silu)), _set_inside(function=nn.functional.gelu), _set_inside(scale=2.0)]),
    "a submodule": (QWEN3, [_set(act_fn=nn.Sequential(nn.SiLU(), nn.Hardtanh(-1, 1))),
                                   lambda experts: experts.act_fn.__setitem__(1, nn.Identity())]),
}


@pytest.mark.parametrize("kind, compiled", [
    pytest.param(kind, compiled, id=f"{kind}-{'compiled' if compiled else 'eager'}", marks=[pytest.mark.full] * (compiled != (kind == "a submodule")))
    for kind in CHANGES for compiled in (False, True)])
def test_changes_are_followed(kind, compiled):
    torch.compiler.reset()
    family, changes = CHANGES[kind]
    experts, (ids, weights) = _experts(*family), _routing(7)
    run = torch.compile(experts, fullgraph=True, backend="aot_eager") if compiled else experts
    if compiled:      # which does not look for new hooks (skip_nnmodule_hook_guards)
        changes = [change for change in changes if change is not _hook]
    x, results = torch.randn(7, HIDDEN) * 2, []
    for change in (lambda experts: None, *changes):
        change(experts)
        experts.config._experts_implementation = "eager"
        expected = experts(x, ids, weights)
        experts.config._experts_implementation = "moe_xe"
        torch.testing.assert_close(run(x, ids, weights), expected, rtol=1e-4, atol=1e-4)
        results.append(expected)
    assert sum((new - old).abs().max() > 1e-3 for old, new in zip(results, results[1:])) >= len(changes) - 1


def test_an_unchanged_gate_is_not_walked_again(monkeypatch):
    experts, walks, walk = _experts(*GPT_OSS), [], gates._Dependencies
    wanted = fused_activation(experts)
    monkeypatch.setattr(gates, "_Dependencies", lambda experts: walks.append(1) or walk(experts))
    monkeypatch.setattr(gates, "_find_activation", None)
    for _ in range(3):
        assert fused_activation(experts) == wanted
    assert not walks
    experts.limit = float(str(experts.limit))       # the same number, but another object
    for _ in range(3):
        assert fused_activation(experts) == wanted
    assert len(walks) == 1


@pytest.mark.parametrize("before, change", [
    ([1.0], lambda values: values.append(2.0)), ([1.0, 2.0], lambda values: values.__setitem__(0, 2.0)),
    ({"a": 1.0}, lambda values: values.update(a=2.0)), ({"a": 1.0}, lambda values: values.update(b=1.0)),
    (([1.0],), lambda values: values[0].append(2.0)), ({"a": [1.0]}, lambda values: values["a"].clear())],
    ids=["append", "item", "update", "new key", "in a tuple", "in a dict"])
def test_changes_inside_containers_are_followed(before, change, monkeypatch):
    experts = _experts(*GPT_OSS)
    experts.values = copy.deepcopy(before)
    for _ in range(2):
        fused_activation(experts)
    found = []
    monkeypatch.setattr(gates, "_find_activation", lambda experts: found.append(1))
    change(experts.values)
    assert fused_activation(experts) is None and len(found) == 1


def test_another_object_at_the_same_address():
    """An id is not enough, as it is given away again."""
    experts = _experts(*QWEN3)
    experts._modules.pop("act_fn")
    for function in (nn.functional.gelu, nn.functional.silu) * 20:
        experts.act_fn = None
        experts.act_fn = functools.partial(function)
        assert fused_activation(experts)[0] == function.__name__


def test_what_is_kept_keeps_nothing_alive():
    experts = _experts(*QWEN3)
    experts.forward = functools.partial(type(experts).forward, experts)      # as hooks of other libraries
    fused_activation(experts)
    gone = weakref.ref(experts)
    del experts
    gc.collect()
    assert gone() is None


class _OfConfiguration(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.__dict__.update(vars(experts))

    def _apply_gate(self, x):
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate.clamp(max=self.config.swiglu_limit)) * up.clamp(-self.config.swiglu_limit, self.config.swiglu_limit)


def test_gates_that_cannot_be_followed_run_as_they_are():
    experts = _experts(*QWEN3)
    assert fused_activation(_OfConfiguration(experts)) is None
    experts.scale = torch.ones(1)
    assert fused_activation(experts) is None
    del experts.scale
    assert fused_activation(experts) == ("silu", 1.0, None)
    experts.act_fn.forward = None
    assert fused_activation(experts) is None


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta"), lambda: torch.autocast("cpu", torch.bfloat16)])
def test_recognised_in_any_mode(mode):
    with mode():
        assert fused_activation(_experts(*QWEN3)) is not None


@pytest.mark.parametrize("change", [_set(limit=0.5), _set(alpha=0.9), _gate], ids=["limit", "alpha", "gate"])
def test_adapted_experts_follow(change):
    experts, (ids, weights) = _experts(*GPT_OSS, **ODD_SIZES), _routing(7)
    module, x = LoraExperts(experts, 8), torch.randn(7, ODD_SIZES["hidden_size"]) * 2
    before = module(x, ids, weights)
    change(experts)
    if change is _gate:
        with pytest.raises(ValueError, match="experts must have one of fused_moe's activations"):
            module(x, ids, weights)
        return
    experts.config._experts_implementation = "eager"
    out, expected = module(x, ids, weights), experts(x, ids, weights)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert (out - before).abs().max() > 1e-2
