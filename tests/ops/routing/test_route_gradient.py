"""The gradient of the weights with respect to the logits, against float64 autograd of the chosen experts' weights."""
import pytest
import torch

import moe_xe

F = torch.nn.functional
SCORES = {"softmax": lambda x, ids: torch.softmax(x, -1).gather(1, ids), "topk_softmax": lambda x, ids: torch.softmax(x.gather(1, ids), -1),
          "sigmoid": lambda x, ids: torch.sigmoid(x).gather(1, ids), "sqrtsoftplus": lambda x, ids: F.softplus(x).sqrt().gather(1, ids)}


@pytest.mark.parametrize("scoring", SCORES)
@pytest.mark.parametrize("options", [{}, dict(renormalize=True, scaling_factor=2.5), dict(renormalize=True, num_groups=4, topk_groups=2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_autograd(scoring, options, dtype, device):
    bias = torch.randn(16, device=device) if "num_groups" in options else None
    logits = torch.randn(23, 16, device=device).to(dtype).requires_grad_()
    weights, ids = moe_xe.route(logits, 3, scoring=scoring, correction_bias=bias, **options)
    gradient = torch.randn_like(weights)
    weights.backward(gradient)

    reference = logits.detach().double().requires_grad_()
    expected = SCORES[scoring](reference, ids.long())
    if options.get("renormalize"):
        expected = expected / expected.sum(-1, keepdim=True)
    (expected * options.get("scaling_factor", 1.0)).backward(gradient.double())
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_opcheck(device):
    logits = torch.randn(5, 8, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.moe_xe.route, (logits, 2, "softmax", None, 1, 1, "max", True, 1.0, torch.int32))
