"""Dataclasses as the arguments of ops: there and back, and what the schema says."""
from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from moe_xe.ops.block.call import BLOCK
from moe_xe.ops.lora.training import LORA, LoraAdapter, LoraCall
from moe_xe.ops.signature import Signature
from moe_xe.plan.choice.block_config import MoeConfig
from moe_xe.plan.choice.choice import Choice
from moe_xe.plan.problem import Activation, ActivationKind

from .block.case import call_of, make, make_shared


def same(a, b) -> bool:
    """Equal, tensors by identity."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
    return a == b


def call(**changes):
    block = call_of(make(bias=(torch.float32, torch.bfloat16), shared=make_shared(37)))
    changed = dict(activation=Activation(ActivationKind.gelu_tanh, True, True, 1.0, 7.5), routed_scaling_factor=2.5,
                   weight_on_input=True)
    return replace(block, **changed | changes)


@pytest.mark.parametrize("changes", [{}, dict(shared=None, b13=None), dict(choice=Choice(autotune=True)),
                                     dict(choice=Choice(MoeConfig())), dict(activation=Activation(ActivationKind.relu2, False))])
def test_a_call_comes_back(changes):
    arguments = BLOCK.flatten(before := call(**changes))
    assert len(arguments) == len(BLOCK) == len(BLOCK.names)
    assert all(value is None or isinstance(value, (torch.Tensor, str, bool, float)) for value in arguments)
    assert same(BLOCK.unflatten(arguments), before)


@pytest.mark.parametrize("lora13, lora2", [(True, True), (True, False), (False, False)])
def test_a_derived_call_comes_back(lora13, lora2):
    adapter = LoraAdapter(torch.randn(6, 3, 50), torch.randn(6, 74, 3), 0.25)
    before = LoraCall(**vars(call(shared=None)), lora13=adapter if lora13 else None, lora2=adapter if lora2 else None)
    assert same(LORA.unflatten(LORA.flatten(before)), before)
    assert LORA.tensors(before).keys() >= ({"lora13.a", "lora13.b"} if lora13 else set())
    assert "lora2.scaling" not in LORA.tensors(before)


def test_names_and_schema():
    assert BLOCK.names[:2] == ("hidden_states", "w13") and "shared.down_proj" in BLOCK.names
    for part in ("Tensor w2", "Tensor? b13", "Tensor? shared_down_proj", "str activation_kind", "float? activation_limit",
                 "bool weight_on_input", "str choice"):
        assert part in BLOCK.schema.split(", ")
    assert torch.ops.moe_xe.fused_moe.default._schema.arguments[1].name == "w13"


def test_tensors_by_name():
    block = call(b2=None)
    found = BLOCK.tensors(block)
    assert found["shared.up_proj"] is block.shared.up_proj and "b2" not in found and "routed_scaling_factor" not in found


def test_the_number_of_arguments_is_checked():
    with pytest.raises(ValueError):
        BLOCK.unflatten(BLOCK.flatten(call())[:-1])


def test_a_field_of_two_types():
    @dataclass
    class Wrong:
        x: int | str

    with pytest.raises(TypeError, match="Wrong.x must have one type, or be a tensor or a dataclass, or be optional"):
        Signature(Wrong)
