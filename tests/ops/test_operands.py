"""What every op does with tensors that are not plain memory, for each op and each argument."""
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_xe

from .every_op import E, H, I, K, ROWS, T, every_op

OPS = list(every_op())


def results(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


# in a process of its own, which a kernel that reads what is not there would kill
FREED = """
import torch
from tests.ops.every_op import every_op

def without_memory(place, num_bytes):
    def change(name, tensor):
        tensor = tensor.clone()
        if name == place:
            tensor.untyped_storage().resize_(num_bytes(tensor))
        return tensor
    return change

for op, case in every_op().items():
    for place, tensor in case.tensors():
        for what, num_bytes in (("freed", lambda t: 0), ("cut", lambda t: t.untyped_storage().nbytes() - t.element_size())):
            if place == "workspace" and what == "cut":
                continue    # asks for one byte more than it needs
            print(op, place, what, end=" ", flush=True)
            wrong = case.mapped(without_memory(place, num_bytes))
            try:
                wrong()
            except ValueError as error:
                print("memory" if f"{place} must have memory for all" in str(error) else error)
            else:
                print("accepted")
            if op.startswith(("grouped_mm", "lora_moe")):
                continue    # which begin with torch's own ops
            print(op, place, what, "in a compiled graph", end=" ", flush=True)
            try:
                wrong.op.__wrapped__(**wrong.arguments)
            except ValueError as error:
                print("memory" if "must have memory for all" in str(error) else error)
            else:
                print("accepted")

case = every_op()["fused_moe"]
options = {name: value for name, value in case.arguments.items() if name not in ("out", "workspace")}
for place in ("w13", "w2", "b13", "b2"):
    leaves = {name: value.clone().requires_grad_() if name in ("hidden_states", "w13", "w2", "b13", "b2") else value
              for name, value in options.items()}
    out = case.op(**leaves)
    leaves[place].untyped_storage().resize_(0)
    print("backward", place, "freed", end=" ", flush=True)
    try:
        out.sum().backward()
    except (ValueError, RuntimeError) as error:
        print("memory" if f"{place} must have memory for all" in str(error) else error)
    else:
        print("accepted")
"""


def test_storage_that_was_freed():
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert run.returncode == 0, f"{run.stdout.splitlines()[-1:]}: {run.stderr}"
    lines = run.stdout.splitlines()
    assert len(lines) > 100 and not [line for line in lines if not line.endswith(" memory")]


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_have_the_results_shapes(name):
    case = every_op()[name]
    for real, meta in zip(results(case()), results(case.mapped(lambda _, tensor: tensor.to("meta"))()), strict=True):
        assert meta.is_meta and (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def test_gradients_of_meta_tensors():
    case = every_op()["fused_moe"].mapped(lambda _, tensor: tensor.to("meta"))
    arguments = {name: value for name, value in case.arguments.items() if name not in ("out", "workspace")}
    leaves = [arguments[name].requires_grad_() for name in ("hidden_states", "w13", "w2", "topk_weights", "b2")]
    moe_xe.fused_moe(**arguments).sum().backward()
    assert all(leaf.grad.is_meta and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("name", OPS)
def test_zeros_without_memory(name):
    case = every_op()[name]
    for place, tensor in case.tensors():
        zeros = torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)
        with pytest.raises(TypeError, match=f"{name.split()[0]}: {place} is a tensor of zeros without memory of its own"):
            case.mapped(lambda other, value: zeros if other == place else value)()


@pytest.mark.parametrize("name", OPS)
def test_negated_views(name):
    """Values are read as torch reads them; nothing is written through such a view."""
    case = every_op()[name]
    wanted = results(case.mapped(lambda place, value: -value if value.is_floating_point() and place != "out" else value.clone())())
    read = case.mapped(lambda place, value: torch._neg_view(value) if value.is_floating_point() and place != "out" else value.clone())
    for got, want in zip(results(read()), wanted, strict=True):
        assert torch.equal(got, want)
    if "out" in case.arguments:
        with pytest.raises(TypeError, match=f"{name.split()[0]}: out is a negated view"):
            case.mapped(lambda place, value: torch._neg_view(value) if place == "out" else value)()


@pytest.mark.parametrize("name", OPS)
def test_other_layouts(name):
    """Sparse and nested tensors, and those of mkldnn."""
    case = every_op()[name]
    for place, tensor in case.tensors():
        if tensor.dim() < 2 or not tensor.is_floating_point():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # of prototypes
            wrong = [tensor.to_sparse(), torch.nested.nested_tensor(list(tensor)), torch.nested.nested_tensor(list(tensor), layout=torch.jagged),
                     tensor.to_mkldnn(), torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)]
        for other in wrong:
            with pytest.raises(TypeError, match=f"{place} must be (a (dense|plain) tensor|.* a quantised weight is a moe_xe.QuantizedWeight)"):
                case.mapped(lambda at, value: other if at == place else value)()


@pytest.mark.parametrize("name", OPS)
def test_fake_and_real_tensors(name):
    case = every_op()[name]
    mode = FakeTensorMode()
    (first, _), *others = case.tensors()
    for place in (first, others[-1][0]):
        with pytest.raises(TypeError, match=f"{name.split()[0]}: all tensors must be fake or none, but .* is and .* is not"):
            case.mapped(lambda at, value: mode.from_tensor(value) if at == place else value)()
    fake = case.mapped(lambda _, value: mode.from_tensor(value))()
    for real, one in zip(results(case()), results(fake), strict=True):
        assert (one.shape, one.dtype, one.device) == (real.shape, real.dtype, real.device)
    with mode, pytest.raises(TypeError, match="all tensors must be fake or none"):
        case()


def test_distributed_tensors():
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore
    init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        for name, case in every_op().items():
            for place, _ in case.tensors():
                with pytest.raises(TypeError, match=rf"{name.split()[0]}: {place} is a DTensor, .* call .to_local\(\) on it"):
                    case.mapped(lambda at, value: distribute_tensor(value, mesh, [Replicate()]) if at == place else value)()
    finally:
        destroy_process_group()


A, W, COUNTS = torch.randn(5, H), torch.randn(2, I, H), torch.tensor([2, 3])


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jvp"])
def test_derivatives_of_torch_func(transform):
    def loss(a):
        return moe_xe.grouped_gemm(a, W, COUNTS).sum()

    with pytest.raises(TypeError, match="grouped_gemm: a is inside torch.func.grad"):
        torch.func.jvp(loss, (A,), (A,)) if transform == "jvp" else getattr(torch.func, transform)(loss)(A)


def test_forward_mode_tangents():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(W, W)
        assert torch.equal(moe_xe.grouped_gemm(A, W, COUNTS), moe_xe.grouped_gemm(A, W.clone(), COUNTS))
        with pytest.raises(TypeError, match="grouped_gemm: w has a forward-mode tangent"):
            moe_xe.grouped_gemm(A, dual, COUNTS)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap():
    several, counts = torch.randn(3, 5, H), torch.tensor([[2, 3], [0, 5], [4, 1]])
    got = torch.vmap(lambda a, rows: moe_xe.grouped_gemm(a, W, rows))(several, counts)
    assert torch.equal(got, torch.stack([moe_xe.grouped_gemm(a, W, rows) for a, rows in zip(several, counts)]))


def test_inference_mode_tensors_in_training():
    """As torch's own ops: refused where backward would need them, else taken."""
    with torch.inference_mode():
        a, counts = A.clone(), COUNTS.clone()
    w = W.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        moe_xe.grouped_gemm(a, w, COUNTS)
    assert torch.equal(moe_xe.grouped_gemm(a, W, counts), moe_xe.grouped_gemm(A, W, COUNTS))


def test_wrapper_without_memory():
    """A subclass whose dispatch hands itself on reaches the op without an address."""
    class Hollow(torch.Tensor):
        @staticmethod
        def __new__(cls, of):
            return torch.Tensor._make_wrapper_subclass(cls, of.shape, dtype=of.dtype)

        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            if func is torch.ops.moe_xe.grouped_gemm.default:
                with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Python)):
                    return func(*args, **(kwargs or {}))
            raise NotImplementedError(func)

    with pytest.raises(ValueError, match="a must have memory for all of its elements"):
        moe_xe.grouped_gemm(Hollow(A), W, COUNTS)


@pytest.mark.parametrize("rows", [0, 5])
def test_gradients_of_no_columns(rows):
    """N = 0: what comes in has a gradient of zeros."""
    a, w = torch.randn(rows, H, requires_grad=True), torch.randn(2, 0, H, requires_grad=True)
    counts = torch.tensor([0, rows])
    moe_xe.grouped_gemm(a, w, counts).sum().backward()
    assert (a.grad == 0).all() and a.grad.shape == a.shape and w.grad.shape == w.shape
    a.grad = w.grad = None
    moe_xe.grouped_mm(a, w.transpose(1, 2), offs=counts.cumsum(0).int()).sum().backward()
    assert (a.grad == 0).all() and a.grad.shape == a.shape and w.grad.shape == w.shape


@pytest.mark.parametrize("name, flag", [
    ("grouped_gemm", "check"), ("grouped_outer", "accumulate"), ("fused_moe", "interleaved"), ("fused_moe", "weight_on_input"),
    ("fused_moe", "recompute"), ("lora_moe", "recompute"), ("route", "renormalize"), ("route", "rounded_scores")])
def test_flags(name, flag):
    case = every_op()[name]
    for value in (1, None, "no"):
        with pytest.raises(TypeError, match=f"{flag} must be a bool, got {type(value).__name__}"):
            case.op(**case.arguments | {flag: value})


class TestNumbers:
    """64-bit values that kernels would cut to 32 bits."""
    @pytest.mark.parametrize("divisor", [0, -1, 2**31, 2**32, 2**33 + 1, 10**400])
    @pytest.mark.parametrize("name", ["grouped_gemm", "grouped_outer", "grouped_outer left"])
    def test_gather_divisor(self, name, divisor):
        case = every_op()[name]
        with pytest.raises(ValueError, match="gather_divisor must be from 1 to 2147483647, got"):
            case.op(**case.arguments | {"gather_divisor": divisor})

    @pytest.mark.parametrize("name", ["grouped_gemm", "grouped_outer"])
    def test_largest_gather_divisor(self, name):
        case = every_op()[name]
        first = {at: torch.zeros_like(value) for at, value in case.arguments.items() if at.startswith("gather_indices")}
        wanted = case.mapped(lambda at, value: first.get(at, value.clone()))()
        assert torch.equal(case.op(**case.arguments | {"gather_divisor": 2**31 - 1}), wanted)

    @pytest.mark.parametrize("name, argument, value", [
        ("route", "top_k", 2**32 + K), ("route", "num_groups", 2**32 + 1), ("sort_tokens", "num_experts", 2**32 + E),
        ("sort_tokens", "num_shared", 2**32 + 1), ("combine", "num_experts", 2**32 + E), ("combine", "num_shared", 2**32 + 1)])
    def test_counts(self, name, argument, value):
        case = every_op()[name]
        with pytest.raises(ValueError, match=f"{argument} must be from . to .*, got {value}"):
            case.op(**case.arguments | {argument: value})

    def test_numpys_integers(self):
        numpy = pytest.importorskip("numpy")
        for name, argument in (("route", "top_k"), ("sort_tokens", "num_experts"), ("combine", "num_shared"), ("grouped_gemm", "gather_divisor"),
                               ("grouped_outer", "gather_divisor")):
            case = every_op()[name]
            wanted = case.mapped(lambda _, value: value.clone())()
            of_numpy = {argument: numpy.int32(case.arguments[argument])}
            for got, want in zip(results(case.op(**case.arguments | of_numpy)), results(wanted), strict=True):
                assert torch.equal(got, want)
        sizes = map(numpy.int32, (2**20, 8, 2**12, 2**11, 64))      # their product does not fit
        assert moe_xe.fused_moe_workspace_bytes(*sizes) == moe_xe.fused_moe_workspace_bytes(2**20, 8, 2**12, 2**11, 64)

    def test_bytes_of_no_size(self):
        with pytest.raises(ValueError, match="num_tokens must be from 0 to 2147483647, got -1"):
            moe_xe.fused_moe_workspace_bytes(-1, K, H, I, E)
        with pytest.raises(TypeError, match="top_k must be an int, got float"):
            moe_xe.fused_moe_workspace_bytes(T, 2.0, H, I, E)


def test_what_the_cases_are():
    """The workspace and the rows are what the ops expect, so that no test above sees another error."""
    assert all(results(case()) for case in every_op().values()) and ROWS == T * K
