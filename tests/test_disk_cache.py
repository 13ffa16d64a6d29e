"""The cache on disk: whole entries or none, whatever happens to the disk, other programs or this one."""
import errno
import sqlite3
import subprocess
import sys
import time
import warnings

import diskcache
import pytest

from moe_xe import disk_cache
from moe_xe.disk_cache import DiskCache, cache_directory, key_of

FACTS = {"kernel": "k", "options": ["-O2"], "problem": {"n": 3, "alpha": 1.702, "bias": None, "gathered": True}}
SIZE = 1 << 30
BINARY = bytes(range(256)) * 400  # large enough for a file of its own


def small_and_large():
    return pytest.mark.parametrize("binary", [b"\0\n\xff", BINARY], ids=["small", "large"])


def raw(directory):
    """The storage below the cache, as another program would see it."""
    return diskcache.Cache(str(directory))


@small_and_large()
def test_another_instance_reads_what_one_stored(tmp_path, binary):
    DiskCache(tmp_path, SIZE).store(FACTS, binary)
    assert DiskCache(tmp_path, SIZE).load(FACTS) == binary
    assert DiskCache(tmp_path, SIZE).load(FACTS | {"kernel": "other"}) is None


def test_drop(tmp_path):
    cache = DiskCache(tmp_path, SIZE)
    cache.store(FACTS, BINARY)
    cache.drop(FACTS)
    assert cache.load(FACTS) is None


@small_and_large()
@pytest.mark.parametrize("damage", [
    lambda entry: entry[:-1],
    lambda entry: entry[:-1] + bytes([entry[-1] ^ 1]),
    lambda entry: b"",
    lambda entry: b"\xff" + entry[1:],
    lambda entry: b"[]" + entry,
    lambda entry: entry.partition(b"\n")[0],
], ids=["cut", "one bit", "empty", "not text", "not the header", "no binary"])
def test_damaged_entry_is_dropped(tmp_path, binary, damage):
    cache, key = DiskCache(tmp_path, SIZE), key_of(FACTS)
    cache.store(FACTS, binary)
    raw(tmp_path)[key] = damage(raw(tmp_path)[key])
    assert cache.load(FACTS) is None
    assert key not in raw(tmp_path)


def test_entry_of_another_kernel_is_dropped(tmp_path):
    cache, key = DiskCache(tmp_path, SIZE), key_of(FACTS)
    cache.store(FACTS | {"kernel": "other"}, BINARY)
    raw(tmp_path)[key] = raw(tmp_path)[key_of(FACTS | {"kernel": "other"})]
    assert cache.load(FACTS) is None
    assert key not in raw(tmp_path)


class Malicious:
    unpickled = False

    def __reduce__(self):
        return setattr, (Malicious, "unpickled", True)


@pytest.mark.parametrize("value", [Malicious(), 17, 1.5, "text", None], ids=["pickle", "int", "float", "text", "none"])
def test_foreign_entry_is_dropped_and_never_unpickled(tmp_path, value):
    cache, key = DiskCache(tmp_path, SIZE), key_of(FACTS)
    raw(tmp_path)[key] = value
    assert cache.load(FACTS) is None
    assert not Malicious.unpickled
    with sqlite3.connect(tmp_path / "cache.db") as database:
        assert database.execute("SELECT count(*) FROM Cache WHERE key = ?", (key,)).fetchone() == (0,)


def test_missing_file_of_an_entry(tmp_path):
    cache = DiskCache(tmp_path, SIZE)
    cache.store(FACTS, BINARY)
    for file in tmp_path.rglob("*.val"):
        file.unlink()
    assert cache.load(FACTS) is None


def test_least_recently_used_entries_leave(tmp_path):
    cache = DiskCache(tmp_path, size_limit=10 * len(BINARY))
    facts = [{"kernel": str(i)} for i in range(30)]
    for each in facts:
        cache.store(each, BINARY)
        assert cache.load(facts[0]) == BINARY  # used all the time
    kept = [i for i, each in enumerate(facts) if cache.load(each) is not None]
    assert 0 in kept and 29 in kept and 1 not in kept
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.val")) <= 10 * len(BINARY)


def use_and_check(cache):
    """All that a cache can do, which gives nothing back here."""
    assert cache.load(FACTS) is None
    assert not cache.store(FACTS, BINARY)
    cache.drop(FACTS)
    assert list(cache.entries()) == [] and cache.volume() >= 0


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot be opened"):
        cache = DiskCache(tmp_path / "file" / "cache", SIZE)
    use_and_check(cache)
    assert cache.clear() == 0


def test_damaged_database(tmp_path):
    (tmp_path / "cache.db").write_bytes(b"this is no database" * 1000)
    with pytest.warns(RuntimeWarning, match="cannot be opened.*delete it"):
        cache = DiskCache(tmp_path, SIZE)
    use_and_check(cache)


def test_database_damaged_while_open(tmp_path):
    cache = DiskCache(tmp_path, SIZE)
    for file in tmp_path.glob("cache.db*"):
        file.write_bytes(b"this is no database" * 1000)
    with pytest.warns(RuntimeWarning, match="moe_xe's cache"):
        use_and_check(cache)
    with pytest.raises(OSError, match="cannot be cleared"):
        cache.clear()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   sqlite3.OperationalError("attempt to write a readonly database")])
def test_full_or_read_only_disk_warns_once(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    cache = DiskCache(tmp_path, SIZE)
    for operation in ("get", "set", "delete", "volume", "clear"):
        monkeypatch.setattr(cache._cache, operation, fail)
    with pytest.warns(RuntimeWarning, match=error.args[-1]) as caught:
        use_and_check(cache)
    assert len([each for each in caught if each.category is RuntimeWarning]) == 1
    with pytest.raises(OSError, match=error.args[-1]):
        cache.clear()


def test_busy_database_is_a_miss_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_cache, "_TIMEOUT_S", 0.01)
    cache = DiskCache(tmp_path, SIZE)
    with sqlite3.connect(tmp_path / "cache.db", isolation_level=None) as other, warnings.catch_warnings():
        warnings.simplefilter("error")
        other.execute("BEGIN EXCLUSIVE")
        assert not cache.store(FACTS, BINARY)
        with pytest.raises(OSError, match="other processes use it"):
            cache.clear()
        other.execute("ROLLBACK")
        assert cache.load(FACTS) is None


def test_entries_and_clear(tmp_path):
    cache = DiskCache(tmp_path, SIZE)
    values = {str(i): BINARY[:i] for i in range(5)}
    for kernel, value in values.items():
        cache.store(FACTS | {"kernel": kernel}, value)
    before = cache.volume()
    assert {facts["kernel"]: value for facts, value in cache.entries()} == values
    assert all(facts == FACTS | {"kernel": facts["kernel"]} for facts, _ in cache.entries())
    assert cache.store(FACTS, BINARY) and cache.volume() > before
    assert cache.clear() == 6
    assert list(cache.entries()) == [] and cache.clear() == 0
    assert cache.store(FACTS, BINARY) and cache.load(FACTS) == BINARY


def test_damaged_and_foreign_entries_are_left_out_and_dropped(tmp_path):
    cache, storage = DiskCache(tmp_path, SIZE), raw(tmp_path)
    for kernel in ("whole", "cut", "renamed"):
        cache.store(FACTS | {"kernel": kernel}, BINARY)
    cut = key_of(FACTS | {"kernel": "cut"})
    storage[cut] = storage[cut][:-1]
    storage["renamed"] = storage.pop(key_of(FACTS | {"kernel": "renamed"}))
    storage["text"], storage["pickle"] = "text", Malicious()
    storage[17] = storage[Malicious] = b""
    assert [facts["kernel"] for facts, _ in cache.entries()] == ["whole"]
    assert not Malicious.unpickled
    assert not {cut, "renamed", "text", "pickle"} & set(DiskCache(tmp_path, SIZE)._keys())
    assert cache.clear() == 3
    assert len(storage) == 0


KILLED = """
import sys
from pathlib import Path
from moe_xe.disk_cache import DiskCache
cache = DiskCache(Path(sys.argv[1]), 1 << 30)
for i in range(1_000_000):
    cache.store({"kernel": "k"}, bytes([i % 251]) * 100_000)     # 100 kB: a file of its own beside the database
    print(i, flush=True)
"""


def test_killed_in_the_middle_of_a_write(tmp_path):
    for delay in (0.0, 0.005):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.communicate()
        value = DiskCache(tmp_path, SIZE).load({"kernel": "k"})
        assert len(value) == 100_000 and len(set(value)) == 1
    cache = DiskCache(tmp_path, SIZE)
    assert cache.store({"kernel": "k"}, BINARY) and cache.load({"kernel": "k"}) == BINARY


def test_environment_names_the_place(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path / "here"))
    assert cache_directory() == tmp_path / "here"
    monkeypatch.delenv("MOE_XE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "moe_xe"


def test_folders_are_the_owners_alone(tmp_path):
    DiskCache(tmp_path / "cache" / "kernels", SIZE)
    for folder in ("cache", "cache/kernels"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700
