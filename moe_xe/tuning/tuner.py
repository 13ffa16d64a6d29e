"""The choice between configurations by measuring them on the user's device, once a key."""
from __future__ import annotations

import functools
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import Progress

from ..once import once
from ..plan.choice.text import to_text
from ..plan.gemm.config import VECTOR_DWORDS, TileConfig, isas_of
from ..timing import interleaved_medians, timed
from .key import Config, TuningKey
from .store import Entry, TuningStore, default_store

SECONDS_VARIABLE = "MOE_XE_TUNE_SECONDS"
DEFAULT_SECONDS = 3.0
LEAST_GAIN = 1.02       # below it the untuned choice stays: noise, and one kernel fewer
MUCH_SLOWER = 1.5       # than the fastest at first sight: not measured again
_SHORT_SECONDS = 0.02   # calls so short are repeated before the first sight counts


class Tuner:
    """Remembers choices in memory and on disk, and measures where neither knows one.

    seconds: for measuring one key, beyond compilation, first sight and three rounds. progress: whether a bar shows where
    stderr is a terminal.
    """

    def __init__(self, store: TuningStore, seconds: float = DEFAULT_SECONDS, progress: bool = True):
        self.seconds = seconds
        self.progress = progress
        self._store = store
        self._entries: dict[TuningKey, Entry] = {}
        self._measuring = threading.RLock()     # one at a time: two would slow each other

    def config_for(self, key: TuningKey, default: Config, candidates: Callable[[], Sequence[Config]],
                   run: Callable[[Config], object], device: torch.device, capturing: bool,
                   check: Callable[[Config], None] = lambda config: None) -> Config:
        """The configuration for this key: known, else `default` in a graph capture, else the fastest measured.

        candidates: what to measure besides `default`, of its class. run: does the whole call in a configuration, on the
        device's current stream; it is called often and must not add to what it finds. One that raises is left out, with a
        warning; what `default` raises is raised. check: raises ValueError for what cannot be used; it is asked of what
        comes from disk, where an imported file may have said anything.
        """
        entry = self._known(key, check)
        if entry is None and capturing:
            return default
        if entry is None:
            with self._measuring:
                entry = self._known(key, check)     # another thread may have measured it meanwhile
                if entry is None:
                    entry = self._entries[key] = self._measure(key, default, candidates(), run, device)
                    self._store.store(key, entry)
        return entry.config

    def known(self) -> dict[TuningKey, Entry]:
        """What this tuner has measured or read from disk so far."""
        return dict(self._entries)

    def _known(self, key: TuningKey, check: Callable[[Config], None]) -> Entry | None:
        entry = self._entries.get(key)
        if entry is None and (entry := self._store.load(key)) is not None:
            if not _serves(entry.config, key):
                return None
            try:
                check(entry.config)
            except ValueError:
                return None
            self._entries[key] = entry
        return entry

    def _measure(self, key: TuningKey, default: Config, candidates: Sequence[Config], run: Callable[[Config], object],
                 device: torch.device) -> Entry:
        configs = list(dict.fromkeys([default, *candidates]))
        hidden = not (self.progress and sys.stderr.isatty())
        with Progress(console=Console(stderr=True), transient=True, refresh_per_second=4, disable=hidden) as progress:
            task = progress.add_task(f"tuning {key.op}", total=len(configs) + 1)
            seconds = {}
            for config in configs:
                try:
                    seconds[config] = _first_sight(functools.partial(run, config), device)
                except Exception as error:
                    if config == default:
                        raise
                    warnings.warn(f"tuning of {key.op}: {to_text(config)} is left out: {error}", RuntimeWarning,
                                  stacklevel=4)
                progress.advance(task)
            most = MUCH_SLOWER * min(seconds.values())
            close = {config: functools.partial(run, config) for config, first in seconds.items()
                     if config == default or first <= most}
            if len(close) > 1:
                seconds |= interleaved_medians(close, device, self.seconds)
        best = min(close, key=seconds.__getitem__)
        choice = best if seconds[default] >= LEAST_GAIN * seconds[best] else default
        return Entry(choice, default, {config: 1e6 * time for config, time in seconds.items()})


def _first_sight(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call that has been compiled: the least of several, or, if it is long, the first."""
    call()
    first = timed(call, device)
    more = 0 if first >= _SHORT_SECONDS else 2 if first >= _SHORT_SECONDS / 10 else 20
    return min(first, *(timed(call, device) for _ in range(more))) if more else first


def _serves(config: Config, key: TuningKey) -> bool:
    """Whether a stored configuration can be for this key: an imported file may say anything."""
    schedule = config.schedule.value if isinstance(config, TileConfig) else ""
    runs = not hasattr(config, "isa") or (key.cpu_isa in VECTOR_DWORDS and config.isa in isas_of(key.cpu_isa))
    return runs and (type(config).__name__, schedule) == (key.kind, key.schedule)


def is_capturing(device: torch.device) -> bool:
    """Whether calls on this device are being captured into a graph, instead of run."""
    if device.type != "xpu" or not hasattr(torch.xpu, "is_current_stream_capturing"):
        return False
    with torch.xpu.device(device):
        return torch.xpu.is_current_stream_capturing()


@once
def default_tuner() -> Tuner:
    """The tuner of `autotune=True`, with the user's store. Raises ValueError for a time budget that is none."""
    text = os.environ.get(SECONDS_VARIABLE, str(DEFAULT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{SECONDS_VARIABLE} is a number of seconds, not {text!r}")
    return Tuner(default_store(), seconds)
