import errno
import sqlite3
import warnings

import diskcache
import pytest

from moe_xe.jit import disk_cache
from moe_xe.jit.cache_key import key_of
from moe_xe.jit.compiler import Compiler
from moe_xe.jit.disk_cache import DiskCache, default_disk_cache

FACTS = {"kernel": "k", "options": ["-O2"]}
BINARY = bytes(range(256)) * 400  # large enough for a file of its own


def small_and_large():
    return pytest.mark.parametrize("binary", [b"\0\n\xff", BINARY], ids=["small", "large"])


def raw(directory):
    """The storage below the cache, as another program would see it."""
    return diskcache.Cache(str(directory))


@small_and_large()
def test_another_instance_reads_what_one_stored(tmp_path, binary):
    DiskCache(tmp_path).store(FACTS, binary)
    assert DiskCache(tmp_path).load(FACTS) == binary
    assert DiskCache(tmp_path).load(FACTS | {"kernel": "other"}) is None


def test_drop(tmp_path):
    cache = DiskCache(tmp_path)
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
    cache, key = DiskCache(tmp_path), key_of(FACTS)
    cache.store(FACTS, binary)
    raw(tmp_path)[key] = damage(raw(tmp_path)[key])
    assert cache.load(FACTS) is None
    assert key not in raw(tmp_path)


def test_entry_of_another_kernel_is_dropped(tmp_path):
    cache, key = DiskCache(tmp_path), key_of(FACTS)
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
    cache, key = DiskCache(tmp_path), key_of(FACTS)
    raw(tmp_path)[key] = value
    assert cache.load(FACTS) is None
    assert not Malicious.unpickled
    with sqlite3.connect(tmp_path / "cache.db") as database:
        assert database.execute("SELECT count(*) FROM Cache WHERE key = ?", (key,)).fetchone() == (0,)


def test_missing_file_of_an_entry(tmp_path):
    cache = DiskCache(tmp_path)
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


def compile_and_check(cache, queue, vector_add, check_adds):
    check_adds(Compiler(cache).kernel(queue, vector_add))


def test_folder_that_cannot_be_made(tmp_path, queue, vector_add, check_adds):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot be opened"):
        cache = DiskCache(tmp_path / "file" / "cache")
    compile_and_check(cache, queue, vector_add, check_adds)


def test_damaged_database(tmp_path, queue, vector_add, check_adds):
    (tmp_path / "cache.db").write_bytes(b"this is no database" * 1000)
    with pytest.warns(RuntimeWarning, match="cannot be opened.*delete it"):
        cache = DiskCache(tmp_path)
    compile_and_check(cache, queue, vector_add, check_adds)


def test_database_damaged_while_open(tmp_path, queue, vector_add, check_adds):
    cache = DiskCache(tmp_path)
    for file in tmp_path.glob("cache.db*"):
        file.write_bytes(b"this is no database" * 1000)
    with pytest.warns(RuntimeWarning, match="kernel cache"):
        compile_and_check(cache, queue, vector_add, check_adds)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   sqlite3.OperationalError("attempt to write a readonly database")])
def test_full_or_read_only_disk_warns_once(tmp_path, queue, vector_add, check_adds, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    cache = DiskCache(tmp_path)
    for operation in ("get", "set", "delete"):
        monkeypatch.setattr(cache._cache, operation, fail)
    with pytest.warns(RuntimeWarning, match=error.args[-1]) as caught:
        compile_and_check(cache, queue, vector_add, check_adds)
        cache.drop(FACTS)
    assert len([each for each in caught if each.category is RuntimeWarning]) == 1


def test_busy_database_is_a_miss_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_cache, "_TIMEOUT_S", 0.01)
    cache = DiskCache(tmp_path)
    with sqlite3.connect(tmp_path / "cache.db", isolation_level=None) as other, warnings.catch_warnings():
        warnings.simplefilter("error")
        other.execute("BEGIN EXCLUSIVE")
        cache.store(FACTS, BINARY)
        other.execute("ROLLBACK")
        assert cache.load(FACTS) is None


def test_environment_names_place_and_size(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("MOE_XE_CACHE_SIZE", "12345")
    cache = default_disk_cache()
    assert cache.directory == tmp_path / "here"
    assert cache._cache.size_limit == 12345
    monkeypatch.setenv("MOE_XE_CACHE_SIZE", "1 GB")
    with pytest.raises(ValueError, match="MOE_XE_CACHE_SIZE"):
        default_disk_cache()


def test_default_place_and_size(tmp_path, monkeypatch):
    monkeypatch.delenv("MOE_XE_CACHE_DIR", raising=False)
    monkeypatch.delenv("MOE_XE_CACHE_SIZE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = default_disk_cache()
    assert cache.directory == tmp_path / "moe_xe" / "kernels"
    assert cache.directory.stat().st_mode & 0o777 == 0o700
    assert cache._cache.size_limit == 1 << 30
