"""Arguments of fused_moe and what it should give for them, in float64; shared by its tests."""
from __future__ import annotations

import inspect

import torch

from moe_xe import Fusions, QuantizedWeight, SharedExpert, fused_moe
from moe_xe.ops.block.call import BlockCall, block_call

F = torch.nn.functional
# largest error of an element over its size plus the reference's RMS, since large results are rounded by as much more, and half the mean
# square of the relative one: the activations and the result are rounded to the type
LIMITS = {torch.bfloat16: (3e-2, 1e-5), torch.float16: (4e-3, 2e-7), torch.float32: (1e-5, 1e-11)}
# of `assert_close` for gradients: z, h, their gradients and the rows' results are rounded to the type on the way, and a gradient once more
GRADIENT_LIMITS = {torch.bfloat16: (5e-2, 8e-3), torch.float16: (5e-3, 1e-3), torch.float32: (1e-5, 1e-6)}
GATES = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"), "relu2": lambda g: g.relu() ** 2}
HIDDEN, INTERMEDIATE = 50, 37       # whole vectors of no instruction set
TOKENS = 7      # which CPUs without AMX read weights in place for: kernels for more take longer to compile


def activated(sums, activation, gated, interleaved, alpha, limit):
    gate, up = sums, None
    if gated:
        gate, up = (sums[..., ::2], sums[..., 1::2]) if interleaved else sums.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), None if up is None else up.clamp(-limit, limit)
    if activation == "swiglu_oai":
        act, up = gate * torch.sigmoid(alpha * gate), None if up is None else up + 1
    else:
        act = GATES[activation](gate)
    return act if up is None else act * up


def reference(hidden_states, w13, w2, topk_weights, topk_ids, *, activation="silu", interleaved=False, alpha=1.702, limit=None,
              b13=None, b2=None, expert_map=None, shared=None, routed_scaling_factor=1.0, weight_on_input=False,
              weight_layout="enk", y_dtype=None, term=lambda value: value) -> torch.Tensor:
    """[T, H]: one expert after the other, in float64. term=torch.square: of the squares of what is added up, as roundings add up."""
    x, out = hidden_states.double(), torch.zeros(hidden_states.shape, dtype=torch.float64)
    w13, w2 = dense(w13), dense(w2)
    if shared is not None:
        shared = SharedExpert(*(w if w is None else dense(w).reshape(w.shape[-2:]) for w in (
            shared.up_proj, shared.down_proj, shared.gate_proj)), shared.weights)
    if weight_layout == "ekn":
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    gated = w13.shape[1] == 2 * w2.shape[2]
    ids = topk_ids.long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < len(expert_map))
        ids = torch.where(known, expert_map.long()[ids.clamp(0, len(expert_map) - 1)], -1)
    for expert in range(w13.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        factor = topk_weights[token, slot].double()[:, None] * routed_scaling_factor
        sums = (x[token] * factor if weight_on_input else x[token]) @ w13[expert].double().T
        sums = sums if b13 is None else sums + b13[expert].double()
        y = term(activated(sums, activation, gated, interleaved, alpha, limit)) @ term(w2[expert].double().T)
        y = y if b2 is None else y + term(b2[expert].double())
        out.index_add_(0, token, y if weight_on_input else y * term(factor))
    if shared is not None:
        up = x @ shared.up_proj.double().T
        sums = up if shared.gate_proj is None else torch.cat([x @ shared.gate_proj.double().T, up], -1)
        y = term(activated(sums, activation, gated, False, alpha, limit)) @ term(shared.down_proj.double().T)
        out += y if shared.weights is None else y * term(shared.weights.double().view(-1, 1))
    return out


def dense(w: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    return w.dequantize(torch.float64) if isinstance(w, QuantizedWeight) else w


def random_ids(tokens: int, top_k: int, experts: int, dtype=torch.int32) -> torch.Tensor:
    """Ragged: later experts are rarer; one in ten is a sentinel; repetitions within a token happen."""
    ids = (torch.rand(tokens, top_k) ** 2 * experts).to(dtype)
    sentinels = torch.tensor([-1, experts, -2**31, 2**31 - 1], dtype=dtype)[torch.randint(4, ids.shape)]
    return torch.where(torch.rand(ids.shape) < 0.1, sentinels, ids)


def random_weights(rows: int, columns: int, dtype: torch.dtype, *leading: int) -> torch.Tensor:
    return (torch.randn(*leading, rows, columns) / columns**0.5).to(dtype)


def make_shared(size: int, gated=True, weights: torch.Tensor | None = None, hidden=HIDDEN, dtype=torch.float32) -> SharedExpert:
    return SharedExpert(random_weights(size, hidden, dtype), random_weights(hidden, size, dtype),
                        random_weights(size, hidden, dtype) if gated else None, weights)


def make(tokens=TOKENS, experts=6, top_k=3, hidden=HIDDEN, intermediate=INTERMEDIATE, dtype=torch.float32, *, gated=True,
         bias: tuple[torch.dtype, torch.dtype] | None = None, weight_layout="enk", ids_dtype=torch.int32,
         weights_dtype=torch.float32, **options) -> dict:
    """Arguments by name. bias: the types of b13 and b2; `options` are fused_moe's own."""
    columns = 2 * intermediate if gated else intermediate
    w13, w2 = random_weights(columns, hidden, dtype, experts), random_weights(hidden, intermediate, dtype, experts)
    if weight_layout == "ekn":
        w13, w2 = w13.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    if bias is not None:
        options |= dict(b13=torch.randn(experts, columns).to(bias[0]), b2=torch.randn(experts, hidden).to(bias[1]))
    return dict(hidden_states=torch.randn(tokens, hidden).to(dtype), w13=w13, w2=w2,
                topk_weights=torch.rand(tokens, top_k).to(weights_dtype), topk_ids=random_ids(tokens, top_k, experts, ids_dtype),
                weight_layout=weight_layout, **options)


def moved(value, device):
    """Tensors, and those of a shared expert, on the device."""
    if isinstance(value, SharedExpert):
        return SharedExpert(**{name: moved(tensor, device) for name, tensor in vars(value).items()})
    return value.to(device) if isinstance(value, (torch.Tensor, QuantizedWeight)) else value


def call_of(arguments: dict) -> BlockCall:
    """What fused_moe makes of these arguments."""
    parameters = inspect.signature(fused_moe).parameters
    return block_call(**{name: arguments.get(name, parameters[name].default) for name in inspect.signature(block_call).parameters})


def run(arguments: dict, device, fusions=Fusions(), out=None, workspace=None) -> torch.Tensor:
    arguments = {name: moved(value, device) for name, value in arguments.items()}
    return fused_moe(**arguments, fusions=fusions, out=out, workspace=workspace)


def few(values: torch.Tensor) -> float:
    """By how much limits that many roundings keep are exceeded where 64 equal values or fewer would be as many (Kish's number):
    each may have cancelled, and the errors may all be near the largest."""
    squares = values.double().square()
    return max(1.0, 8 / (squares.sum() / squares.square().sum().sqrt()).nan_to_num(1.0).item())


def assert_right(out: torch.Tensor, expected: torch.Tensor, squared_terms: torch.Tensor | None = None) -> None:
    """squared_terms: the reference of term=torch.square, which of many terms is as large as the result's square, unless they cancel."""
    squares, tiny, (largest, calc_diff) = expected.square(), torch.finfo(torch.float64).tiny, LIMITS[out.dtype]
    terms = squares if squared_terms is None else squared_terms
    errors = (out.cpu().double() - expected).abs()
    relative = errors / (expected.abs() + torch.maximum(squares.mean(), terms).sqrt().clamp_min(tiny))
    mean = errors.square().sum() / (squares + terms).sum().clamp_min(tiny)
    assert mean <= calc_diff * few(terms.sqrt()) and (relative <= largest).all(), (mean, relative.max())


def check(arguments: dict, device, **options) -> torch.Tensor:
    """Runs into poison, and compares with the reference."""
    x = arguments["hidden_states"]
    out = torch.full(x.shape, float("nan"), dtype=x.dtype, device=device)
    run(arguments, device, out=out, **options)
    assert_right(out, reference(**arguments), reference(**arguments, term=torch.square))
    return out


def _rms(values: torch.Tensor, dims: int | tuple[int, ...] | None = None) -> torch.Tensor:
    return values.square().mean(dims, keepdim=dims is not None).sqrt()


def assert_close(got: torch.Tensor, want: torch.Tensor, limits: tuple[float, float], name: str = "out",
                 sizes: torch.Tensor | None = None) -> None:
    """limits: of an element's error over its size plus that of the sums about it, and of the RMS of errors over that of all. sizes: as
    large as elements are, unless their terms cancel.

    A weight's gradient is a sum of few outer products: where a token's row is large, so are the terms of a whole row or column,
    of which an element may still be small. They are taken to be as large as the RMS of the row times that of the column over
    their matrix's, or as that, or as that of all. Exactly zero where all should be.
    """
    assert got.shape == want.shape, name
    if not want.numel():
        return
    want = want.double().cpu()
    sizes = want if sizes is None else torch.maximum(want.abs(), sizes)
    difference, rms = got.double().cpu() - want, _rms(sizes)
    terms = rms
    if want.ndim >= 2:
        matrix = _rms(want, (-2, -1))
        terms = torch.maximum(torch.maximum(rms, matrix), _rms(want, -1) * _rms(want, -2) / matrix.clamp_min(1e-30))
    largest = (difference.abs() / (want.abs() + terms).clamp_min(1e-30)).max().item()
    mean = (_rms(difference) / rms.clamp_min(1e-30)).item()
    assert max(largest / limits[0], mean / limits[1]) <= few(sizes), (name, largest, mean)
