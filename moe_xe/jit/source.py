"""Problem and configuration -> the text that the run-time compiler gets: constants, then the kernel's file."""
from __future__ import annotations

import dataclasses
import functools

from ..plan.gemm.config import CpuConfig, Schedule, TileConfig, XeConfig
from ..plan.formats import Codes, Quantization, ScaleType
from ..plan.outer.config import OuterConfig
from ..plan.problem import GroupedGemmProblem
from .kernel_source import KernelSource

_FREE_FUNCTION = "SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::{}))"
_ATTRIBUTES = {
    "CPU": [_FREE_FUNCTION.format("nd_range_kernel<1>"), _FREE_FUNCTION.format("sub_group_size<4>")],
    "XE": [_FREE_FUNCTION.format("nd_range_kernel<1>"), _FREE_FUNCTION.format("sub_group_size<16>"),
           "SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::intel::experimental::grf_size<{grf_size}>))"],
    "GENERIC": [_FREE_FUNCTION.format("nd_range_kernel<1>"), _FREE_FUNCTION.format("sub_group_size<16>")],
}


def family_of(config: TileConfig) -> str:
    return "CPU" if isinstance(config, CpuConfig) else "XE" if isinstance(config, XeConfig) else "GENERIC"


def bool_constant(value: bool) -> str:
    return str(value).lower()


def _float(value: float) -> str:
    return f"{float(value)!r}f"


def _constant(name: str, value) -> str:
    """One field of a configuration as a constant of the same name."""
    if name == "isa":
        return f"inline constexpr Isa isa = Isa::{value};"
    if isinstance(value, Schedule):
        return f"inline constexpr Schedule schedule = Schedule::{'dynamic' if value is Schedule.dynamic else 'static_stride'};"
    if isinstance(value, tuple):
        return f"inline constexpr int {name}[] = {{{', '.join(map(str, value))}}};"
    return f"inline constexpr int {name} = {value};"


def constants_of(config: TileConfig | OuterConfig) -> list[str]:
    """The fields of a configuration that its kernel is compiled for."""
    return [_constant(field.name, getattr(config, field.name)) for field in dataclasses.fields(config) if "host_only" not in field.metadata]


KERNEL_NAME = "grouped_gemm"
# fourteen pointers, ten int64, num_experts: the fields of Arguments in types.hpp
KERNEL_SIGNATURE = 14 * "p" + 10 * "q" + "i"


@functools.lru_cache(maxsize=4096)
def grouped_gemm_source(problem: GroupedGemmProblem, config: TileConfig) -> KernelSource:
    """The kernel for this problem and configuration."""
    return KernelSource(KERNEL_NAME, KERNEL_SIGNATURE, generate(problem, config))


def generate(problem: GroupedGemmProblem, config: TileConfig) -> str:
    """C++ text of the grouped GEMM for this problem and configuration."""
    return assemble(family_of(config), *gemm_constants(problem, config), "grouped_gemm.cpp", getattr(config, "grf_size", 256))


def gemm_constants(problem: GroupedGemmProblem, config: TileConfig) -> tuple[list[str], list[str]]:
    """The lines of the namespaces `problem` and `config` of a grouped GEMM."""
    act = problem.activation
    pairs = "none" if act is None or not act.gated else "interleaved" if act.interleaved else "halves"
    return [
        f"inline constexpr int64 n = {problem.n}, k = {problem.k};",
        f"inline constexpr Dtype input = Dtype::{problem.input.value}, output = Dtype::{problem.output.value}, "
        f"bias = Dtype::{(problem.bias or problem.output).value};",
        f"inline constexpr WeightLayout weights = WeightLayout::{problem.weights.value};",
        f"inline constexpr RowsFormat rows_format = RowsFormat::{problem.rows_format.value};",
        f"using RowCount = int{problem.rows_bits};",
        f"inline constexpr bool has_bias = {bool_constant(problem.bias is not None)}, gathered = {bool_constant(problem.gathered)}, "
        f"scattered = {bool_constant(problem.scattered)}, has_limit = {bool_constant(act is not None and act.limit is not None)};",
        f"inline constexpr int slots = {problem.slots}, shared = {problem.shared};",
        f"inline constexpr Pairs pairs = Pairs::{pairs};",
        f"inline constexpr Act act = Act::{act.kind.value if act else 'none'};",
        f"inline constexpr float act_alpha = {_float(act.alpha if act else 1.0)}, act_limit = {_float((act and act.limit) or 0.0)};",
        f"inline constexpr RowScale row_scale = RowScale::{problem.row_scale.value};",
        *_quantization_constants(problem.quantization),
    ], [
        f"inline constexpr int64 scratch_bytes = {config.scratch_bytes(problem)}, entry_bytes = {config.entry_bytes};",
        *constants_of(config),
    ]


def _quantization_constants(quantization: Quantization | None) -> list[str]:
    """Of dense weights, too, so that what a kernel does not use compiles."""
    q = quantization or Quantization(Codes.int8, ScaleType.f32, 1, 1)
    return [
        f"inline constexpr Codes codes = Codes::{'none' if quantization is None else q.codes.value};",
        f"inline constexpr ScaleType scale_type = ScaleType::{q.scales.value};",
        f"inline constexpr int64 group_rows = {q.rows}, group_columns = {q.columns};",
        f"inline constexpr bool has_zeros = {bool_constant(q.zeros)}, has_global_scales = {bool_constant(q.global_scales)};",
        f"inline constexpr bool finite_codes = {bool_constant(q.finite)};",
        f"inline constexpr float zero = {_float(q.zero)};",
    ]


def assemble(family: str, problem: list[str], config: list[str], kernel_file: str, grf_size: int = 256) -> str:
    """The text for one of the files in sycl_kernels/kernels: constants, then the file.

    family: "CPU" (one work-item a work-group), "XE" (sub-groups of 16, grf_size registers a thread) or "GENERIC" (sub-groups of 16);
    the file sees MOE_XE_<family> and MOE_XE_KERNEL_ATTRIBUTES. problem, config: lines of the namespaces of those names.
    """
    return "\n".join([
        *preamble(family, grf_size),
        "#include <moe_xe/types.hpp>",
        "namespace moe_xe::problem {", *problem, "}",
        "namespace moe_xe::config {", *config, "}",
        f"#include <kernels/{kernel_file}>", ""])


def preamble(family: str, grf_size: int = 256) -> list[str]:
    """The lines that every kernel of a family begins with."""
    return [
        f"#define MOE_XE_{family} 1",
        *(["#include <sycl/ext/intel/experimental/grf_size_properties.hpp>"] if family == "XE" else []),
        "#define MOE_XE_KERNEL_ATTRIBUTES " + " ".join(_ATTRIBUTES[family]).format(grf_size=grf_size)]
