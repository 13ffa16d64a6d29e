"""The kernel visits exactly the tiles that the host-side model predicts, in its order, each once."""
import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moe_xe import runtime
from moe_xe.bench.workloads import recorded_layers
from moe_xe.isa import kernels, ocloc, spirv
from moe_xe.jit import KernelSource, compile_kernel, sources_dir
from moe_xe.jit.source import generate
from moe_xe.plan.gemm.config import GenericConfig, Schedule, TileConfig
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.plan.launch import QUEUE_WORDS, RECORD_BYTES, num_entries
from moe_xe.plan.problem import Dtype, GroupedGemmProblem, RowsFormat
from moe_xe.plan.model.schedule import num_rows, tiles

RECORDER = Path(__file__).with_name("record_tiles.hpp")
PROBLEM = GroupedGemmProblem(2880, 2880, Dtype.bf16, Dtype.bf16)
SMALL = GenericConfig(heights=(64, 32, 16), tile_width=64, raster_group=3, min_fill_eighths=6, schedule=Schedule.dynamic,
                      sub_group_rows=(16, 16, 16), sub_group_columns=(64, 32, 16))
missing = spirv.missing() or ocloc.missing()


def text_of(problem: GroupedGemmProblem, config: TileConfig) -> str:
    return generate(problem, config).replace("#include <kernels/grouped_gemm.cpp>", RECORDER.read_text())


def rows_array(counts, problem: GroupedGemmProblem) -> np.ndarray:
    values = np.cumsum(counts) if problem.rows_format is RowsFormat.ends else np.ascontiguousarray(np.array(counts).T)
    return values.astype(np.int64 if problem.rows_bits == 64 else np.int32)


class Launch:
    """Arguments of the recorder; each tile is to be seen once, under the number that the host's model gives it.

    counts: rows of each expert, or of each expert's ranks. Of the batched layout an expert has room for as many as the most has, and one.
    """

    def __init__(self, counts, problem: GroupedGemmProblem, config: TileConfig, groups: int):
        total_rows = sum(map(num_rows, counts))
        self.predicted = list(tiles(counts, problem.n, config))
        if problem.rows_format is RowsFormat.batched:
            room = max(counts) + 1
            total_rows = room * len(counts)
            self.predicted = [dataclasses.replace(t, row=t.row + t.expert * room - sum(counts[:t.expert])) for t in self.predicted]
        most = config.most_records(problem, total_rows, len(counts))
        assert len(self.predicted) <= most * config.splits
        self.rows, self.queue_words = rows_array(counts, problem), np.zeros(QUEUE_WORDS, np.int32)
        entries = num_entries(len(counts), problem.ranks) * RECORD_BYTES
        self.scratch = np.full((groups * config.scratch_bytes(problem) + entries + most * config.entry_bytes) // 4, -7, np.int32)
        self.seen = np.zeros((len(self.predicted) + 50, 7), np.int32)
        self.sizes = (np.int64(total_rows), np.int32(len(counts)), np.int32(len(self.seen)))

    def check(self):
        found = self.seen.tolist()
        assert found[len(self.predicted):] == [[0] * 7] * 50
        assert found[:len(self.predicted)] == [[t.expert, t.height, t.rows, t.column, t.row, t.part, 1] for t in self.predicted]


def record_on_cpu_device(counts, problem, config, groups):
    queue = runtime.Queue.create("cpu")
    kernel = compile_kernel(queue, KernelSource("record_tiles", "ppppqii", text_of(problem, config)))
    launch = Launch(counts, problem, config, groups)
    arrays = (launch.rows, launch.queue_words, launch.scratch, launch.seen)
    kernel.launch(queue, groups, config.work_group_size, (*(array.ctypes.data for array in arrays), *map(int, launch.sizes)))
    queue.wait()
    launch.check()


@pytest.mark.parametrize("groups", [1, 2, 20])
@pytest.mark.parametrize("layer", [0, 11])
def test_recorded_layers_with_the_shapes_for_xe(layer, groups):
    """The list that a work-group of many lanes makes, on the CPU device."""
    counts = recorded_layers()[layer]
    xe = kernels.default_config(PROBLEM, sum(counts), len(counts))
    same = GenericConfig(**{field.name: getattr(xe, field.name) for field in dataclasses.fields(GenericConfig)})
    record_on_cpu_device(counts, PROBLEM, same, groups)


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("rows_format", RowsFormat)
@pytest.mark.parametrize("rows_bits", [32, 64])
def test_both_schedules_and_all_forms_of_row_counts(schedule, rows_format, rows_bits):
    problem = dataclasses.replace(PROBLEM, rows_format=rows_format, rows_bits=rows_bits)
    generator = np.random.default_rng()
    counts = (generator.integers(0, 300, 37) * generator.integers(0, 2, 37)).tolist()
    record_on_cpu_device(counts, problem, dataclasses.replace(SMALL, schedule=schedule), 7)


@pytest.mark.few(2)
@pytest.mark.parametrize("family, splits", [("cpu", 1), ("generic", 1), ("generic", 3)])
@pytest.mark.parametrize("ranks", [2, 9])
def test_rows_of_several_ranks(ranks, family, splits):
    """More experts than lanes; ranks without rows, experts without rows, some of one rank only."""
    problem = dataclasses.replace(PROBLEM, n=100, ranks=ranks)
    generator = np.random.default_rng()
    table = generator.integers(0, 90 // splits, (37, ranks)) * generator.integers(0, 2, (37, ranks)) * (np.arange(37) % 5 > 0)[:, None]
    table[:, 1] = 0
    config = SMALL if family == "generic" else cpu_config(problem, runtime.cpu_isa())
    record_on_cpu_device(list(map(tuple, table.tolist())), problem, dataclasses.replace(config, splits=splits), 3)


@pytest.mark.parametrize("counts", [[0], [1], [0, 0, 0], [5] * 512, [0] * 600 + [700], [100_000, 3]])
@pytest.mark.parametrize("family", ["cpu", "generic"])
def test_edges(counts, family):
    record_on_cpu_device(counts, PROBLEM, SMALL if family == "generic" else cpu_config(PROBLEM, runtime.cpu_isa()), 3)


@pytest.mark.few(1)
@pytest.mark.parametrize("family", ["cpu", "generic"])
def test_parts_of_k(family):
    config = SMALL if family == "generic" else cpu_config(PROBLEM, runtime.cpu_isa())
    record_on_cpu_device([0, 3, 70, 0, 1], PROBLEM, dataclasses.replace(config, splits=3), 3)


@cache
def machine_code():
    from xesim import Kernel
    root = sources_dir()
    image = spirv.compile_to_spirv(text_of(PROBLEM, SMALL), [f"-I{root / 'include'}", f"-I{root}"])
    return Kernel(ocloc.build(image, "bmg"), "record_tiles")


@pytest.mark.skipif(bool(missing), reason=missing or "-")
@pytest.mark.parametrize("groups, seed", [(1, 0), (3, 1), (8, 2), (20, 3), (40, 4)])
def test_machine_code_in_the_simulator(groups, seed):
    """Bmg code, work-groups interleaved at random."""
    counts = [300, 0, 1, 70, 15, 0, 130, 33] + [9] * 20
    launch, size = Launch(counts, PROBLEM, SMALL, groups), SMALL.work_group_size
    machine_code().launch((groups * size,), (size,), [launch.rows, launch.queue_words, launch.scratch, launch.seen, *launch.sizes],
                          seed=seed, max_groups=groups, quantum=50)
    launch.check()
