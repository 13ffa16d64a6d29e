"""The gradients of a block: how they are asked for, and what they should be."""
from __future__ import annotations

from collections.abc import Callable

import torch

from .block_models import Family, Inputs, Weights, experts_parameters, reference_of, reference_of_expert, wide


class Gradients:
    """What is timed and checked in training: gradients of hidden states, routing weights and all parameters.

    Checked are those of the hidden states and routing weights of the tokens `sample`, and of one expert's parameters.
    with_forward: each call runs the forward pass too, instead of going backward through one pass again and again.
    """

    def __init__(self, family: Family, weights: Weights, inputs: Inputs, sample: torch.Tensor, with_forward: bool):
        self.sample, self.with_forward = sample, with_forward
        self.grad_out = torch.randn_like(inputs.hidden_states, requires_grad=False)
        self.parameters = experts_parameters(weights)
        shared = {} if weights.shared is None else vars(weights.shared)
        self.leaves = {"hidden_states": inputs.hidden_states, "topk_weights": inputs.topk_weights, **self.parameters,
                       **{f"shared.{name}": weight for name, weight in shared.items() if weight is not None}}
        rows = inputs.topk_ids.flatten().bincount(minlength=family.model.num_experts)
        self.expert = int(torch.where(rows > 0, rows, rows.max() + 1).argmin())     # the fewest rows: the quickest reference
        self.expected = {**self._of_tokens(family, weights, inputs), **self._of_expert(family, inputs)}

    def call(self, forward: Callable[[], torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
        """What computes the gradients by name."""
        out = None if self.with_forward else forward()

        def gradients() -> dict[str, torch.Tensor]:
            values = torch.autograd.grad(forward() if out is None else out, list(self.leaves.values()), self.grad_out,
                                         retain_graph=not self.with_forward)
            return dict(zip(self.leaves, values))

        return gradients

    def sampled(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**{name: gradients[name][self.sample] for name in ("hidden_states", "topk_weights")},
                **{name: gradients[name][self.expert] for name in self.parameters}}

    def _of_tokens(self, family: Family, weights: Weights, inputs: Inputs) -> dict[str, torch.Tensor]:
        x, factors, grad_out = (wide(tensor[self.sample], inputs)
                                for tensor in (inputs.hidden_states, inputs.topk_weights, self.grad_out))
        leaves = [x.requires_grad_(), factors.requires_grad_()]
        out = reference_of(family, weights, x, factors, inputs.topk_ids[self.sample].cpu())
        return dict(zip(("hidden_states", "topk_weights"), torch.autograd.grad(out, leaves, grad_out)))

    def _of_expert(self, family: Family, inputs: Inputs) -> dict[str, torch.Tensor]:
        rows, slots = (inputs.topk_ids == self.expert).nonzero(as_tuple=True)
        x, factors, grad_out = (wide(tensor, inputs) for tensor in (
            inputs.hidden_states[rows], inputs.topk_weights[rows, slots, None], self.grad_out[rows]))
        leaves = {name: wide(tensor[self.expert], inputs).requires_grad_() for name, tensor in self.parameters.items()}
        out = reference_of_expert(family, x, factors, **leaves)
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad_out)))
