"""Ranks for tests: processes on gloo that are started once and do jobs, functions of modules, together."""
from __future__ import annotations

import atexit
import fcntl
import functools
import io
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_xe.jit.compiler import Compiler

SECONDS = 120       # of one job, on cores that others use, too


class Ranks:
    """size processes of one group. Their threads are one each: they share the cores."""

    def __init__(self, size: int, seconds: float = SECONDS):
        self.size, self.seconds = size, seconds
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor", "hypothesis", "pytest"])      # take seconds to import
        self._folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pipes]
        self.processes = [context.Process(target=_serve, args=(rank, size, self._folder.name, seconds, theirs), daemon=True)
                          for rank, (_, theirs) in enumerate(pipes)]
        with _environment(OMP_NUM_THREADS="1"):
            for process in self.processes:
                process.start()
        for _, theirs in pipes:
            theirs.close()

    def outcomes(self, job, *arguments) -> list:
        """job(rank, *arguments) on each rank, and its result or exception, by rank. A rank that died has an EOFError."""
        for pipe in self._pipes:
            pipe.send_bytes(_packed((job, arguments)))
        return [self._outcome(rank) for rank in range(self.size)]

    def run(self, job, *arguments) -> list:
        """As `outcomes`, but raises the first exception."""
        outcomes = self.outcomes(job, *arguments)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                raise AssertionError(f"rank {rank} of {self.size}") from outcome
        return outcomes

    def _outcome(self, rank: int):
        if not self._pipes[rank].poll(self.seconds + 30):
            self.stop()
            raise TimeoutError(f"rank {rank} of {self.size} took more than {self.seconds} s")
        try:
            return _unpacked(self._pipes[rank].recv_bytes())
        except EOFError as error:
            return error

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        self._folder.cleanup()


@functools.cache
def ranks(size: int) -> Ranks:
    """Of this pytest process, started when they are asked for first."""
    started = Ranks(size)
    atexit.register(started.stop)
    return started


class _environment:
    def __init__(self, **variables: str):
        self._variables, self._before = variables, {name: os.environ.get(name) for name in variables}

    def __enter__(self):
        os.environ.update(self._variables)

    def __exit__(self, *_):
        for name, value in self._before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _packed(value) -> bytes:
    """Tensors as bytes, of any type, and not as shared memory."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(received: bytes):
    return torch.load(io.BytesIO(received), weights_only=False)


def _compile_in_turn(lock: str) -> None:
    """Ranks come to a new kernel together: one compiles it, and the others find it on disk."""
    compile_or_find = Compiler._make

    def make(*arguments):
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return compile_or_find(*arguments)

    Compiler._make = make


def _serve(rank: int, size: int, folder: str, seconds: float, pipe) -> None:
    torch.set_num_threads(1)
    _compile_in_turn(f"{folder}/lock")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    while True:
        try:
            received = pipe.recv_bytes()
        except EOFError:
            return
        try:
            job, arguments = _unpacked(received)
            outcome = job(rank, *arguments)
        except Exception as error:
            outcome = error.with_traceback(None)
            outcome.add_note(traceback.format_exc())
        pipe.send_bytes(_packed(outcome))
