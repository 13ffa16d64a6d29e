"""One call on several threads at once."""
from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch


def assert_threads_agree(run: Callable[[object], torch.Tensor], cases: Sequence[object], expected: list[torch.Tensor], rounds: int) -> None:
    """A thread runs each case so many times, all at once, with the same bits each time."""
    failures = []

    def work(index: int) -> None:
        for _ in range(rounds):
            if not torch.equal(run(cases[index]), expected[index]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
