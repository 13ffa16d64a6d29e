"""What is computed: the shape, the types and the fusions of one grouped GEMM, as plain values."""
from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .formats import Quantization

INT32_MAX = 2**31 - 1       # kernels count tiles, columns and experts in int32
INT8_MAX_K = 2**16          # of products of codes, whose int32 sums hold 127 * 255 each
MAX_COLUMNS = 2**30         # of any operand: kernels step beyond the last one


class Dtype(str, Enum):
    bf16 = "bf16"
    f16 = "f16"
    f32 = "f32"
    i8 = "i8"      # only of activations that are codes, which have a scale for each row

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return {Dtype.f32: 4, Dtype.i8: 1}.get(self, 2)


FLOATS = (Dtype.bf16, Dtype.f16, Dtype.f32)


class WeightLayout(str, Enum):
    """The order of the weights in memory; the last letter is the contiguous dimension."""
    enk = "enk"
    ekn = "ekn"


class RowsFormat(str, Enum):
    """How the device array describes the experts' rows; batched: counts of rows in an equal share of all rows for each expert."""
    counts = "counts"
    ends = "ends"
    batched = "batched"


class ActivationKind(str, Enum):
    """What is applied to a gate value g: silu g*sigmoid(g); gelu with erf; gelu_tanh, its tanh approximation; relu2
    max(g, 0)^2; swiglu_oai g*sigmoid(alpha*g), whose up value is raised by one (gpt-oss)."""
    silu = "silu"
    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    relu2 = "relu2"
    swiglu_oai = "swiglu_oai"


ACTIVATION_NAMES = tuple(kind.value for kind in ActivationKind)    # dynamo does not trace an enumeration's members


@dataclass(frozen=True)
class Activation:
    """What becomes of a GEMM's sums, in float32: ``act(gate) * up`` of pairs of columns, or ``act(sum)`` if not gated.

    interleaved: a pair is columns 2c and 2c + 1 instead of c and N/2 + c. alpha: of swiglu_oai. limit: gates are cut at
    most to it, up values to [-limit, limit].
    """
    kind: ActivationKind = ActivationKind.silu
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None


class RowScale(str, Enum):
    """Where a row's factor is applied: to the sums, before bias and activation, or to the outputs, after them."""
    none = "none"
    sums = "sums"
    outputs = "outputs"


@dataclass(frozen=True)
class GroupedGemmProblem:
    """``d[rows of e] = act(a[rows of e] @ w[e]^T (+ bias[e]))``: all that a kernel is compiled for.

    n, k: rows of one expert's weights, and columns of a. rows_bits: 32 or 64, the integer type of the row counts.
    gathered: row r of the sorted rows is ``a[row_indices[r] // slots]``; scattered: it is written to ``d[row_indices[r]]``.
    shared: how many groups of rows, the first ones, have weights in tensors of their own. tf32: float32 inputs may be
    rounded to tf32. quantization: of the weights, which are codes then; a quantised weight has no shared ones beside it.
    ranks: rows come by rank and, within a rank, by expert; there is a row of counts for each rank. input i8: a has codes, each row with a
    scale, which are multiplied with the weights' codes.
    """
    n: int
    k: int
    input: Dtype
    output: Dtype
    weights: WeightLayout = WeightLayout.enk
    bias: Dtype | None = None
    rows_format: RowsFormat = RowsFormat.counts
    rows_bits: int = 32
    gathered: bool = False
    tf32: bool = False
    scattered: bool = False
    slots: int = 1
    activation: Activation | None = None
    row_scale: RowScale = RowScale.none
    shared: int = 0
    quantization: Quantization | None = None
    ranks: int = 1

    def __str__(self) -> str:
        act = self.activation
        codes = self.quantization and self.quantization.codes
        parts = (self.input.value if self.input is self.output else f"{self.input.value}->{self.output.value}",
                 "" if codes is None else f"{codes.value} weights", f"N={self.n} K={self.k} {self.weights.value}", "gathered" if self.gathered else "", "scattered" if self.scattered else "",
                 "" if act is None else f"{act.kind.value}{' of pairs' if act.gated else ''}",
                 f"of {self.ranks} ranks" if self.ranks > 1 else "")
        return " ".join(filter(None, parts))

    @property
    def pairs(self) -> bool:
        """Whether two columns of sums become one of d."""
        return self.activation is not None and self.activation.gated

    @property
    def weight_bits(self) -> int:
        """Of one weight, or its code."""
        return self.quantization.codes.bits if self.quantization else 8 * self.input.size

    @property
    def weight_bytes(self) -> float:
        """Of one weight in memory, with its share of scales."""
        return self.quantization.weight_bytes if self.quantization else self.input.size

    @property
    def out_n(self) -> int:
        """Columns of d."""
        return self.n // 2 if self.pairs else self.n


@dataclass(frozen=True)
class Operands:
    """Where the operands lie: base addresses in bytes, strides in elements. num_experts counts shared experts too. scales, zeros
    and global_scales: of codes in w; a_scales: of those in a; 0 if there are none. most_rows: that one expert has, if that is known."""
    a: int
    w: int
    d: int
    total_rows: int
    a_rows: int
    num_experts: int
    a_stride: int
    w_stride: int
    w_expert_stride: int
    d_stride: int
    d_rows: int
    shared_w: int = 0
    shared_up: int = 0
    shared_stride: int = 0
    shared_expert_stride: int = 0
    scales: int = 0
    zeros: int = 0
    global_scales: int = 0
    a_scales: int = 0
    most_rows: int | None = None

    @property
    def of_codes(self) -> tuple[int | None, int | None, int | None]:
        """The kernels' pointers to scales, zeros and global scales."""
        return self.scales or None, self.zeros or None, self.global_scales or None
