"""Each wrong argument of fused_moe gets an error that names it, what it was and what was expected, before any launch."""
from dataclasses import replace

import pytest
import torch

import moe_xe
from moe_xe import SharedExpert

T, H, I, E, K = 5, 8, 6, 3, 2
X, W13, W2 = torch.randn(T, H), torch.randn(E, 2 * I, H), torch.randn(E, H, I)
TOPK_WEIGHTS, TOPK_IDS = torch.rand(T, K), torch.zeros(T, K, dtype=torch.int32)
SHARED = SharedExpert(torch.randn(I, H), torch.randn(H, I), torch.randn(I, H))
NO_GATE = replace(SHARED, gate_proj=None)
BYTES = moe_xe.fused_moe_workspace_bytes(T, K, H, I, E, dtype=torch.float32)
BYTES_SHARED = moe_xe.fused_moe_workspace_bytes(T, K, H, I, E, dtype=torch.float32, shared_intermediate_size=I)


def misaligned(*shape: int) -> torch.Tensor:
    """float32 that begins one byte behind a multiple of four."""
    size = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(4 * size + 1), dtype=torch.float32, offset=1, count=size).view(shape)


WRONG = {
    "no tensor": (dict(hidden_states=[1.0]), TypeError, r"hidden_states must be a torch.Tensor \[T, H\], got list"),
    "hidden_states 3D": (dict(hidden_states=X[None]), ValueError, r"hidden_states must have 2 dimensions \[T, H\], got float32\[1, 5, 8\]"),
    "hidden_states double": (dict(hidden_states=X.double()), TypeError, "hidden_states must be bfloat16, float16 or float32, got torch.float64"),
    "hidden_states sparse": (dict(hidden_states=X.to_sparse()), TypeError, "hidden_states must be a dense tensor"),
    "hidden_states columns": (dict(hidden_states=torch.randn(H, T).T), ValueError, r"hidden_states's rows must be contiguous .* strides \(1, 5\)"),
    "hidden_states' H": (dict(hidden_states=X[:, :7]), ValueError, r"agree in H: hidden_states is float32\[5, 7\], w13 has H = 8"),
    "w13 2D": (dict(w13=W13[0]), ValueError, r"w13 must have 3 dimensions \[E, N, K\], got float32\[12, 8\]"),
    "w13's type": (dict(w13=W13.bfloat16()), TypeError, "w13 must have hidden_states's dtype torch.float32, got torch.bfloat16"),
    "w13 without a contiguous dimension": (dict(w13=torch.randn(E, 4 * I, 2 * H)[:, ::2, ::2]), ValueError, "w13 must be contiguous in its last"),
    "w13's I": (dict(w13=W13[:, :11]), ValueError, r"w13 \[E, 2I or I, H\] and w2 \[E, H, I\] must fit .* \[3, 11, 8\] and \[3, 8, 6\]"),
    "w2 2D": (dict(w2=W2[0]), ValueError, "w2 must have 3 dimensions"),
    "w2's type": (dict(w2=W2.half()), TypeError, "w2 must have hidden_states's dtype torch.float32, got torch.float16"),
    "w2's E": (dict(w2=W2[:2]), ValueError, r"must fit together .* \[3, 12, 8\] and \[2, 8, 6\]"),
    "w2's H": (dict(w2=W2[:, :7]), ValueError, r"must fit together .* \[3, 12, 8\] and \[3, 7, 6\]"),
    "w2's I": (dict(w2=W2[:, :, :5]), ValueError, r"must fit together .* \[3, 12, 8\] and \[3, 8, 5\]"),
    "no experts": (dict(w13=W13[:0], w2=W2[:0]), ValueError, "must fit together and not be empty"),
    "no intermediate size": (dict(w13=W13[:, :0], w2=W2[:, :, :0]), ValueError, "must fit together and not be empty"),
    "unknown layout": (dict(weight_layout="nk"), ValueError, "weight_layout must be .* got 'nk'"),
    "the other layout": (dict(weight_layout="ekn"), ValueError, "agree in H: .* w13 has H = 12"),
    "topk_weights 1D": (dict(topk_weights=TOPK_WEIGHTS[:, 0]), ValueError, "topk_weights must have 2 dimensions"),
    "topk_weights' shape": (dict(topk_weights=TOPK_WEIGHTS[:, :1]), ValueError, r"topk_weights must be .* = \[5, 2\], got \[5, 1\]"),
    "topk_weights int": (dict(topk_weights=TOPK_IDS), TypeError, "topk_weights must be bfloat16, float16 or float32, got torch.int32"),
    "topk_weights missing": (dict(topk_weights=None), TypeError, "topk_weights must be a torch.Tensor .* got NoneType"),
    "topk_ids float": (dict(topk_ids=TOPK_WEIGHTS), TypeError, "topk_ids must be int32 or int64, got torch.float32"),
    "topk_ids short": (dict(topk_ids=TOPK_IDS[:, 0]), ValueError, "topk_ids must have 2 dimensions"),
    "topk_ids' T": (dict(topk_ids=TOPK_IDS[:4], topk_weights=TOPK_WEIGHTS[:4]), ValueError, r"topk_ids must have a row for each of the 5 .* int32\[4, 2\]"),
    "no slots": (dict(topk_ids=TOPK_IDS[:, :0], topk_weights=TOPK_WEIGHTS[:, :0]), ValueError, "topk_ids must have 1 to"),
    "b13's shape": (dict(b13=torch.zeros(E, I)), ValueError, r"b13 must be \[E, N\] = \[3, 12\], got \[3, 6\]"),
    "b13 int": (dict(b13=torch.zeros(E, 2 * I, dtype=torch.int8)), TypeError, "b13 must be bfloat16, float16 or float32, got torch.int8"),
    "b13 columns": (dict(b13=torch.zeros(2 * I, E).T), ValueError, "b13's rows must be contiguous"),
    "b2's shape": (dict(b2=torch.zeros(E, 7)), ValueError, r"b2 must be \[E, N\] = \[3, 8\], got \[3, 7\]"),
    "b2 no tensor": (dict(b2=0.0), TypeError, "b2 must be a torch.Tensor"),
    "expert_map int64": (dict(expert_map=torch.arange(E)), TypeError, "expert_map must be int32, got torch.int64"),
    "expert_map 2D": (dict(expert_map=torch.zeros(1, E, dtype=torch.int32)), ValueError, "expert_map must have 1 dimensions"),
    "expert_map empty": (dict(expert_map=torch.zeros(0, dtype=torch.int32)), ValueError, "expert_map must have at least one entry"),
    "factor": (dict(routed_scaling_factor="2"), TypeError, "routed_scaling_factor must be a number, got str"),
    "activation": (dict(activation="swish"), ValueError, "activation must be one of silu, .* got 'swish'"),
    "limit 0": (dict(limit=0.0), ValueError, "limit must be positive and finite .* limit = 0.0"),
    "limit negative": (dict(limit=-7), ValueError, "limit must be positive and finite .* limit = -7"),
    "limit NaN": (dict(limit=float("nan")), ValueError, "limit must be positive and finite .* limit = nan"),
    "limit infinite": (dict(limit=float("inf")), ValueError, "limit must be positive and finite .* limit = inf"),
    "alpha infinite": (dict(alpha=float("inf")), ValueError, "alpha must be finite in float32, got alpha = inf"),
    "limit a string": (dict(limit="7"), TypeError, "limit must be a number, got str"),
    "fusions": (dict(fusions="all"), TypeError, "fusions must be a Fusions, got str"),
    "shared.weights no tensor": (dict(shared=replace(SHARED, weights=1.0)), TypeError, "shared.weights must be a torch.Tensor"),
    "shared no expert": (dict(shared=(SHARED.up_proj, SHARED.down_proj)), TypeError, "shared must be a SharedExpert, got tuple"),
    "shared without a gate": (dict(shared=NO_GATE), ValueError, "shared.gate_proj must be given, as the routed experts have a gate"),
    "shared with a gate": (dict(shared=SHARED, w13=W13[:, :I]), ValueError, "shared.gate_proj must be None, as the routed experts have no gate"),
    "shared's up 3D": (dict(shared=replace(SHARED, up_proj=SHARED.up_proj[None])), ValueError, r"shared.up_proj must have 2 dimensions \[I_s, H\]"),
    "shared's gate": (dict(shared=replace(SHARED, gate_proj=SHARED.gate_proj[:5])), ValueError,
                      r"shared.gate_proj must be float32\[6, 8\], got float32\[5, 8\]"),
    "shared's down": (dict(shared=replace(SHARED, down_proj=SHARED.up_proj)), ValueError, r"shared.down_proj must be float32\[8, 6\], got float32\[6, 8\]"),
    "shared's type": (dict(shared=replace(SHARED, up_proj=SHARED.up_proj.half())), ValueError, "shared.up_proj must be float32.* got float16"),
    "shared's columns": (dict(shared=replace(SHARED, down_proj=torch.randn(I, H).T)), ValueError, "shared.down_proj's rows must be contiguous"),
    "shared's weights": (dict(shared=replace(SHARED, weights=torch.ones(T, 2))), ValueError, r"shared.weights must be \[T\] or \[T, 1\] with T = 5, got \[5, 2\]"),
    "shared's weights int": (dict(shared=replace(SHARED, weights=TOPK_IDS[:, 0])), TypeError, "shared.weights must be bfloat16, float16 or float32"),
    "shared misaligned": (dict(shared=replace(SHARED, down_proj=misaligned(H, I))), ValueError, "shared.down_proj must be aligned to its 4-byte elements"),
    "out's shape": (dict(out=torch.empty(T, 9)), ValueError, r"out must be float32\[5, 8\], got float32\[5, 9\]"),
    "out's type": (dict(out=torch.empty(T, H).half()), ValueError, r"out must be float32\[5, 8\], got float16"),
    "out's rows overlap": (dict(out=torch.empty(H).expand(T, H)), ValueError, "out's rows must not overlap"),
    "out's columns": (dict(out=torch.empty(H, T).T), ValueError, "out's rows must be contiguous"),
    "out is hidden_states": (dict(out=X), ValueError, "out must not share memory with hidden_states"),
    "workspace no tensor": (dict(workspace=BYTES), TypeError, r"workspace must be a torch.Tensor \[bytes\], got int"),
    "workspace float": (dict(workspace=torch.empty(BYTES)), TypeError, "workspace must be a contiguous uint8 tensor, got float32"),
    "workspace strided": (dict(workspace=torch.empty(2 * BYTES, dtype=torch.uint8)[::2]), TypeError, "workspace must be a contiguous uint8 tensor"),
    "workspace 2D": (dict(workspace=torch.empty(2, BYTES, dtype=torch.uint8)), ValueError, "workspace must have 1 dimensions"),
    "workspace short": (dict(workspace=torch.empty(BYTES - 1, dtype=torch.uint8)), ValueError, f"workspace must have at least {BYTES} bytes .* got {BYTES - 1}"),
    "hidden_states misaligned": (dict(hidden_states=misaligned(T, H)), ValueError, "hidden_states must be aligned to its 4-byte elements"),
    "b2 misaligned": (dict(b2=misaligned(E, H)), ValueError, "b2 must be aligned to its 4-byte elements"),
    "alpha beyond float32": (dict(alpha=1e39, activation="swiglu_oai"), ValueError, "alpha must be finite in float32, got alpha = 1e[+]39"),
    "limit that float32 has as zero": (dict(limit=1e-50), ValueError, "limit must be positive and finite in float32, got limit = 1e-50"),
    "limit of many digits": (dict(limit=10**400), ValueError, "limit must be positive and finite .* an int of 1329 bits"),
    "factor of many digits": (dict(routed_scaling_factor=10**5000), ValueError, "routed_scaling_factor must be finite .* an int of 16610 bits"),
    "shared without a down projection": (dict(shared=replace(SHARED, down_proj=None)), TypeError, r"shared.down_proj must be a torch.Tensor .* NoneType"),
    "shared without an up projection": (dict(shared=replace(SHARED, up_proj=None)), TypeError, r"shared.up_proj must be a torch.Tensor .* NoneType"),
}


@pytest.mark.parametrize("case", WRONG)
def test_fused_moe(case):
    changes, error, message = WRONG[case]
    arguments = dict(hidden_states=X, w13=W13, w2=W2, topk_weights=TOPK_WEIGHTS, topk_ids=TOPK_IDS) | changes
    with pytest.raises(error, match=message):
        moe_xe.fused_moe(**arguments)


@pytest.mark.parametrize("name", ["w13", "w2", "topk_weights", "b13", "b2", "expert_map", "out", "workspace"])
def test_two_devices(name):
    arguments = dict(hidden_states=X, w13=W13, w2=W2, topk_weights=TOPK_WEIGHTS, topk_ids=TOPK_IDS, b13=torch.zeros(E, 2 * I), b2=torch.zeros(E, H),
                     expert_map=torch.zeros(E, dtype=torch.int32), out=torch.empty(T, H), workspace=torch.empty(BYTES, dtype=torch.uint8))
    with pytest.raises(ValueError, match=f"all tensors must be on one device: .*{name} is on meta"):
        moe_xe.fused_moe(**arguments | {name: arguments[name].to("meta")})


@pytest.mark.parametrize("name", ["up_proj", "down_proj", "gate_proj", "weights"])
def test_shared_expert_on_another_device(name):
    shared = replace(SHARED, weights=torch.ones(T))
    shared = replace(shared, **{name: getattr(shared, name).to("meta")})
    with pytest.raises(ValueError, match=f"all tensors must be on one device: .*shared.{name} is on meta"):
        moe_xe.fused_moe(X, W13, W2, TOPK_WEIGHTS, TOPK_IDS, shared=shared)


@pytest.mark.parametrize("name", ["w13", "w2", "b13", "b2"])
def test_out_within_an_input(name):
    arguments = dict(hidden_states=X, w13=W13.clone(), w2=W2.clone(), topk_weights=TOPK_WEIGHTS, topk_ids=TOPK_IDS,
                     b13=torch.zeros(2 * E, 2 * I)[:E], b2=torch.zeros(2 * E, H)[:E])
    out = torch.as_strided(arguments[name], (T, H), (H, 1))
    with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
        moe_xe.fused_moe(**arguments, out=out)


def test_out_that_requires_a_gradient():
    out = torch.empty(T, H, requires_grad=True)
    with pytest.raises(ValueError, match="out must be left out where a gradient is asked for, but out requires one"):
        moe_xe.fused_moe(X, W13, W2, TOPK_WEIGHTS, TOPK_IDS, out=out)


def test_workspace_bytes():
    with pytest.raises(TypeError, match="^dtype must be bfloat16, float16 or float32, got torch.float64"):
        moe_xe.fused_moe_workspace_bytes(T, K, H, I, E, dtype=torch.float64)


def test_out_in_a_shared_expert_or_the_workspace():
    memory = torch.randn(I, H)
    with pytest.raises(ValueError, match="out must not share memory with shared.up_proj"):
        moe_xe.fused_moe(X, W13, W2, TOPK_WEIGHTS, TOPK_IDS, shared=replace(SHARED, up_proj=memory), out=memory[:T])
    workspace = torch.empty(BYTES + T * H * 4 + 1024, dtype=torch.uint8)
    out = workspace[-T * H * 4:].view(torch.float32).view(T, H)
    with pytest.raises(ValueError, match="out must not share memory with workspace"):
        moe_xe.fused_moe(X, W13, W2, TOPK_WEIGHTS, TOPK_IDS, out=out, workspace=workspace)


@pytest.mark.parametrize("name", ["hidden_states", "w13", "w2", "topk_weights", "b2", "shared.gate_proj"])
def test_workspace_within_an_input(name):
    shape, dtype = {"hidden_states": (T, H), "w13": (E, 2 * I, H), "w2": (E, H, I), "topk_weights": (T, K), "b2": (E, H),
                    "shared.gate_proj": (I, H)}[name], torch.float32
    memory = torch.zeros(BYTES_SHARED + 4096, dtype=torch.uint8)
    size = 4 * torch.Size(shape).numel()
    tensor = memory[:size].view(dtype).view(shape)
    arguments = dict(hidden_states=X, w13=W13, w2=W2, topk_weights=TOPK_WEIGHTS, topk_ids=TOPK_IDS, b2=torch.zeros(E, H), shared=SHARED)
    given = dict(shared=replace(SHARED, gate_proj=tensor)) if name.startswith("shared") else {name: tensor}
    with pytest.raises(ValueError, match=f"workspace must not share memory with {name}"):
        moe_xe.fused_moe(**arguments | given, workspace=memory[:BYTES_SHARED])
    moe_xe.fused_moe(**arguments | given, workspace=memory[size:])


@pytest.mark.parametrize("offset", [0, 1, 2, 7, 255])
def test_workspace_at_any_address(offset):
    memory = torch.frombuffer(bytearray(BYTES_SHARED + 512), dtype=torch.uint8, offset=offset)
    arguments = dict(hidden_states=X, w13=W13, w2=W2, topk_weights=TOPK_WEIGHTS, topk_ids=TOPK_IDS, b2=torch.zeros(E, H), shared=SHARED)
    expected = moe_xe.fused_moe(**arguments)
    for workspace in (memory[:BYTES_SHARED], memory[1:][:BYTES_SHARED]):
        memory.fill_(255)
        assert torch.equal(moe_xe.fused_moe(**arguments, workspace=workspace), expected)
        assert (memory[1 + BYTES_SHARED:] == 255).all()
