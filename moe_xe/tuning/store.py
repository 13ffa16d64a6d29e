"""Measured choices on disk, and as one file to carry to other machines."""
from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..disk_cache import DiskCache, Facts, cache_directory
from ..plan.choice.text import from_text, to_text
from .key import Config, TuningKey

SIZE_LIMIT = 64 << 20   # bytes: ten thousands of entries
FORMAT = "moe_xe tuning 1"
LARGEST_FILE = 4 * SIZE_LIMIT       # of an import: more than a full store's export
SHORTEST, LONGEST = 1e-6, 1e12      # microseconds that a clock can have measured


@dataclass(frozen=True)
class Entry:
    """What measuring found. config: the choice; default: the untuned one; microseconds: the median of each configuration,
    or the least of a few calls where that was enough to leave it out. All are of one class.
    """
    config: Config
    default: Config
    microseconds: dict[Config, float]

    @property
    def speedup(self) -> float:
        """The default's time / the choice's."""
        return self.microseconds[self.default] / self.microseconds[self.config]

    def as_dict(self) -> dict:
        """The entry as values that JSON gives back as they are; configurations are config_text's."""
        return {"config": to_text(self.config), "default": to_text(self.default),
                "microseconds": {to_text(config): time for config, time in self.microseconds.items()}}

    @classmethod
    def from_dict(cls, values: dict) -> Entry:
        """Raises ValueError for what is no entry, naming what is wrong."""
        if not isinstance(values, dict) or values.keys() != {"config", "default", "microseconds"}:
            raise ValueError(f"an entry must be an object with config, default, microseconds, got {reprlib.repr(values)}")
        times = values["microseconds"]
        if not isinstance(times, dict) or not all(type(time) in (int, float) and SHORTEST <= time <= LONGEST
                                                  for time in times.values()):
            raise ValueError(f"microseconds of an entry must be an object of numbers from {SHORTEST:g} to {LONGEST:g}, got "
                             f"{reprlib.repr(times)}")
        for name in ("config", "default"):
            if not isinstance(values[name], str) or values[name] not in times:
                raise ValueError(f"{name} of an entry must be one of its microseconds, got {reprlib.repr(values[name])}")
        configs = {text: from_text(text) for text in times}
        kinds = {type(config) for config in configs.values()}
        if len(kinds) > 1 or not all(issubclass(kind, Config) for kind in kinds):
            raise ValueError("the configurations of an entry must be of one kind and of one launch, got "
                             f"{', '.join(sorted(kind.__name__ for kind in kinds))}")
        return cls(configs[values["config"]], configs[values["default"]],
                   {configs[text]: time for text, time in times.items()})


class TuningStore:
    """Keys -> entries, on disk, shared by processes.

    Nothing raises for what the disk does, except where a person asks for a result: export_to, import_from, clear.
    """

    def __init__(self, disk: DiskCache):
        self.disk = disk

    def load(self, key: TuningKey) -> Entry | None:
        """The entry of this key; None where there is none that can be trusted."""
        value = self.disk.load(key.facts())
        return None if value is None else self._entry(key.facts(), value)

    def store(self, key: TuningKey, entry: Entry) -> bool:
        """Whether the entry is on disk now."""
        return self.disk.store(key.facts(), json.dumps(entry.as_dict()).encode())

    def entries(self) -> Iterator[tuple[TuningKey, Entry]]:
        """All entries, those of other devices and versions too; damaged ones are dropped."""
        for facts, value in self.disk.entries():
            try:
                key = TuningKey.from_facts(facts)
            except ValueError as error:
                self.disk.drop(facts, str(error))
                continue
            if (entry := self._entry(facts, value)) is not None:
                yield key, entry

    def _entry(self, facts: Facts, value: bytes) -> Entry | None:
        """What is stored under these facts; None, and it is dropped, if it is no entry."""
        try:
            return Entry.from_dict(json.loads(value))
        except (ValueError, RecursionError) as error:
            self.disk.drop(facts, str(error))
            return None

    def clear(self) -> int:
        """Removes all entries and says how many there were. Raises OSError."""
        return self.disk.clear()

    def export_to(self, path: Path) -> int:
        """Writes all entries to a JSON file and says how many. Raises OSError."""
        entries = [{"key": key.facts(), "entry": entry.as_dict()} for key, entry in self.entries()]
        path.write_text(json.dumps({"format": FORMAT, "entries": entries}, indent=1))
        return len(entries)

    def import_from(self, path: Path) -> int:
        """Adds all entries of such a file, in place of those with equal keys, and says how many.

        Raises OSError; ValueError, before anything is added, unless every entry is right.
        """
        pairs = _parsed(path)
        stored = sum(self.store(key, entry) for key, entry in pairs)
        if stored < len(pairs):
            raise OSError(f"only {stored} of {len(pairs)} entries could be written to {self.disk.directory}")
        return stored


def _parsed(path: Path) -> list[tuple[TuningKey, Entry]]:
    with path.open("rb") as file:
        text = file.read(LARGEST_FILE + 1)
    if len(text) > LARGEST_FILE:
        raise ValueError(f"{path} is no export of tuning results: it has more than {LARGEST_FILE} bytes")
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT or not isinstance(contents.get("entries"), list):
        raise ValueError(f'{path} is no export of tuning results: expected an object with "format": "{FORMAT}" and "entries"')
    pairs = []
    for number, each in enumerate(contents["entries"]):
        try:
            if not isinstance(each, dict) or each.keys() != {"key", "entry"}:
                raise ValueError(f"expected an object with key and entry, got {reprlib.repr(each)}")
            pairs.append((TuningKey.from_facts(each["key"]), Entry.from_dict(each["entry"])))
        except ValueError as error:
            raise ValueError(f"{path}, entry {number}: {error}") from error
    return pairs


def default_store() -> TuningStore:
    """The user's tuning results, where the environment says."""
    return TuningStore(DiskCache(cache_directory() / "tuning", SIZE_LIMIT))
