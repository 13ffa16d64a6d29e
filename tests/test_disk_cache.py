"""The cache on disk: whole entries or none, whatever happens to the disk, other programs or this one."""
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_xe import disk_cache
from moe_xe.disk_cache import DamageWarning, DiskCache, cache_directory, key_of

FACTS = {"kernel": "k", "options": ["-O2"], "problem": {"n": 3, "alpha": 1.702, "bias": None, "gathered": True}}
SIZE = 1 << 30
BINARY = bytes(range(256)) * 400


def file_of(directory, facts=FACTS):
    """The entry's file, as another program would see it."""
    return directory / key_of(facts)


def entry_of(facts: bytes, value: bytes = b"value") -> bytes:
    """What a program that knows the form of our files could write."""
    contents = len(facts).to_bytes(8, "little") + facts + value
    return hashlib.sha256(contents).digest() + contents


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_another_instance_reads_what_one_stored(tmp_path):
    for binary in (b"", b"\0\n\xff", BINARY):
        assert DiskCache(tmp_path, SIZE).store(FACTS, binary)
        assert DiskCache(tmp_path, SIZE).load(FACTS) == binary
    assert DiskCache(tmp_path, SIZE).load(FACTS | {"kernel": "other"}) is None


def test_files_and_folders_are_the_owners_alone(tmp_path):
    DiskCache(tmp_path / "new" / "cache" / "kernels", SIZE).store(FACTS, BINARY)
    for folder in ("new", "new/cache", "new/cache/kernels"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700
    file, = (tmp_path / "new" / "cache" / "kernels").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_drop(tmp_path):
    cache = DiskCache(tmp_path, SIZE)
    cache.store(FACTS, BINARY)
    with no_warnings():
        cache.drop(FACTS)
        cache.drop(FACTS)
    assert cache.load(FACTS) is None
    cache.store(FACTS, BINARY)
    with pytest.warns(DamageWarning, match="the driver refuses it"):
        cache.drop(FACTS, "the driver refuses it")
    assert cache.load(FACTS) is None


OF_ANOTHER = entry_of(json.dumps(FACTS | {"kernel": "other"}, sort_keys=True).encode())


@pytest.mark.parametrize("damage", [
    lambda entry: entry[:-1],
    lambda entry: entry[:20],
    lambda entry: b"",
    lambda entry: entry[:-1] + bytes([entry[-1] ^ 1]),
    lambda entry: bytes([entry[0] ^ 128]) + entry[1:],
    lambda entry: entry + b"\0",
    lambda entry: OF_ANOTHER,
    lambda entry: entry_of(b"\xff not text"),
    lambda entry: entry_of(b"[" * 100_000),
    lambda entry: entry_of(b"1" * 100_000),
    lambda entry: entry_of(b'{"kernel": "\\ud800"}'),
    lambda entry: entry_of(b"[]"),
], ids=["cut", "hardly begun", "empty", "one bit", "first bit", "longer", "other facts", "no text", "deep", "large number", "surrogate",
        "list"])
def test_damaged_entry_is_set_aside_with_one_warning(tmp_path, damage):
    for look in (lambda cache: cache.load(FACTS), lambda cache: next(cache.entries(), None)):
        cache = DiskCache(tmp_path, SIZE)
        for _ in range(2):
            cache.store(FACTS, BINARY)
            file_of(tmp_path).write_bytes(damage(file_of(tmp_path).read_bytes()))
            with pytest.warns(DamageWarning, match="damaged entries") if not cache._warned else no_warnings():
                assert look(cache) is None
            assert not file_of(tmp_path).exists()
        assert cache.store(FACTS, BINARY) and cache.load(FACTS) == BINARY


@pytest.mark.parametrize("make", [
    os.mkfifo,
    lambda file: file.mkdir(),
    lambda file: file.symlink_to("/dev/zero"),
    lambda file: file.symlink_to(file),
    lambda file: (file.touch(0o600), os.truncate(file, 1 << 40)),
    lambda file: (file.write_bytes(entry_of(json.dumps(FACTS, sort_keys=True).encode())), file.chmod(0o666)),
], ids=["fifo", "folder", "link", "endless link", "endless file", "writable"])
def test_what_is_no_file_of_ours_is_no_entry(tmp_path, make):
    cache, file = DiskCache(tmp_path, SIZE), file_of(tmp_path)
    make(file)
    with pytest.warns(RuntimeWarning, match="moe_xe's cache"):
        assert cache.load(FACTS) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(cache.entries()) == [] and cache.volume() < 1000
        if cache.store(FACTS, BINARY):      # all but the folder are replaced
            assert cache.load(FACTS) == BINARY
        assert file.is_dir() or file.is_file()
        cache.clear()


def test_files_of_others_are_never_touched(tmp_path):
    cache = DiskCache(tmp_path, size_limit=1000)
    foreign = [tmp_path / name for name in ("cache.db", "notes.txt", "a" * 63, "A" * 64, "a" * 64 + ".tmp")]
    for file in foreign:
        file.write_bytes(BINARY)
        os.utime(file, (0, 0))
    assert cache.store(FACTS, b"value") and cache.volume() < 1000 and len(list(cache.entries())) == 1
    assert cache.clear() == 1
    assert all(file.read_bytes() == BINARY for file in foreign)


def used_all_the_time(cache, count):
    facts = [{"kernel": str(i)} for i in range(count)]
    for each in facts:
        assert cache.store(each, BINARY)
        assert cache.load(facts[0]) == BINARY
    return [i for i, each in enumerate(facts) if cache.load(each) is not None]


def test_least_recently_used_entries_leave(tmp_path):
    kept = used_all_the_time(DiskCache(tmp_path, size_limit=10 * len(BINARY)), 30)
    assert 0 in kept and kept[1:] == list(range(kept[1], 30)) and len(kept) >= 7
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 10 * len(BINARY)
    assert not DiskCache(tmp_path, size_limit=len(BINARY)).store(FACTS, BINARY)     # larger than all that may be
    assert not DiskCache(tmp_path, size_limit=0).store(FACTS, b"")
    with no_warnings():
        assert DiskCache(tmp_path, size_limit=0).load({"kernel": "29"}) == BINARY       # it is there already


def test_looking_at_all_entries_is_no_use_of_them(tmp_path):
    cache = DiskCache(tmp_path, SIZE)
    for kernel in "ba":
        cache.store({"kernel": kernel}, BINARY)
        os.utime(file_of(tmp_path, {"kernel": kernel}), (1000, 1000))
    assert len(list(cache.entries())) == 2 and {file.stat().st_mtime for file in tmp_path.iterdir()} == {1000}
    assert cache.load({"kernel": "b"}) and file_of(tmp_path, {"kernel": "b"}).stat().st_mtime > 1000


def use_and_check(cache):
    """All that a cache can do, which gives nothing back here."""
    assert cache.load(FACTS) is None
    assert not cache.store(FACTS, BINARY)
    cache.drop(FACTS)
    assert list(cache.entries()) == [] and cache.volume() == 0


def check_unused(directory, reason):
    """One warning, nothing read or written, and nothing raised but by clear."""
    before = {path: path.lstat().st_mtime_ns for path in directory.parent.rglob("*")}
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        cache = DiskCache(directory, SIZE)
        use_and_check(cache)
    assert len(caught) == 1 and str(directory.parent) in str(caught[0].message)
    with pytest.raises(OSError, match="cannot be cleared"):
        cache.clear()
    assert {path: path.lstat().st_mtime_ns for path in directory.parent.rglob("*")} == before


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    check_unused(tmp_path / "file" / "cache", "cannot be opened")


@pytest.fixture
def warm(tmp_path):
    """A folder with an entry, and with one that does not exist of its own accord."""
    directory = tmp_path / "cache" / "kernels"
    DiskCache(directory, SIZE).store(FACTS, BINARY)
    return directory


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_folder_that_others_can_write_is_left_unused(warm, mode):
    warm.chmod(mode)
    check_unused(warm, f"kernels can be written by others than its owner, its mode is {mode:o}")


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_folder_below_one_that_others_can_write_is_left_unused(warm, mode):
    warm.parent.chmod(mode)
    check_unused(warm, "cache can be written by others than its owner")


def test_folder_below_a_sticky_one_is_used(warm):
    warm.parent.chmod(0o1777)       # as /tmp: only its owner can replace it
    with no_warnings():
        assert DiskCache(warm, SIZE).load(FACTS) == BINARY


@pytest.mark.parametrize("link", ["kernels", "cache"])
def test_folder_behind_a_symlink_is_left_unused(tmp_path, warm, link):
    place = {"kernels": warm, "cache": warm.parent}[link]
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    check_unused(warm, f"{link} is a symbolic link")


def test_folder_of_another_user_is_left_unused(warm, monkeypatch):
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    check_unused(warm, f"another user's, of id {owner}")


def test_entry_of_another_user_is_not_used(warm, monkeypatch):
    """It was planted when others could write."""
    stat = os.fstat
    monkeypatch.setattr(os, "fstat", lambda descriptor: type("Status", (), {
        name: getattr(stat(descriptor), name) + (name == "st_uid" and os.readlink(f"/proc/self/fd/{descriptor}").endswith(key_of(FACTS)))
        for name in ("st_mode", "st_uid", "st_size")}))
    with pytest.warns(DamageWarning, match="another user's"):
        assert DiskCache(warm, SIZE).load(FACTS) is None


def test_disk_that_can_only_be_read_is_read(warm, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *rest, **named:
                        fail() if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) else real(path, flags, *rest, **named))
    for name in ("mkdir", "utime", "unlink", "replace"):
        monkeypatch.setattr(os, name, fail)
    with no_warnings():
        cache = DiskCache(warm, SIZE)
        assert cache.load(FACTS) == BINARY and dict((facts["kernel"], value) for facts, value in cache.entries()) == {"k": BINARY}
    with pytest.warns(RuntimeWarning, match="cannot be written.*Read-only") as caught:
        assert not cache.store({"kernel": "other"}, BINARY) and not cache.store(FACTS, b"")
    assert len(caught) == 1 and cache.load(FACTS) == BINARY
    with pytest.raises(OSError, match="Read-only"):
        cache.clear()


def test_full_disk_is_read_and_keeps_nothing_unfinished(warm):
    cache, limits = DiskCache(warm, SIZE), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.warns(RuntimeWarning, match="cannot be written") as caught:
            assert not cache.store({"kernel": "other"}, BINARY) and not cache.store(FACTS, 2 * BINARY)
        assert len(caught) == 1 and cache.load(FACTS) == BINARY
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in warm.iterdir()] == [key_of(FACTS)]


def test_folder_removed_meanwhile_is_made_again(tmp_path):
    cache = DiskCache(tmp_path / "cache" / "kernels", SIZE)
    shutil.rmtree(tmp_path / "cache")
    with no_warnings():
        assert cache.load(FACTS) is None and list(cache.entries()) == [] and cache.volume() == cache.clear() == 0
        cache.drop(FACTS)
        assert cache.store(FACTS, BINARY) and cache.load(FACTS) == BINARY


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


def test_damaged_entries_are_left_out_of_all(tmp_path):
    cache = DiskCache(tmp_path, SIZE)
    for kernel in ("whole", "cut", "renamed"):
        cache.store(FACTS | {"kernel": kernel}, BINARY)
    cut, renamed = (file_of(tmp_path, FACTS | {"kernel": kernel}) for kernel in ("cut", "renamed"))
    cut.write_bytes(cut.read_bytes()[:-1])
    renamed.rename(tmp_path / ("0" * 64))
    with pytest.warns(DamageWarning) as caught:
        assert [facts["kernel"] for facts, _ in cache.entries()] == ["whole"]
    assert len(caught) == 1
    assert [file.name for file in tmp_path.iterdir()] == [key_of(FACTS | {"kernel": "whole"})]


KINDS_OF_DAMAGE = 7


def damage(data: random.Random, file: Path, facts: bytes) -> None:
    entry = bytearray(file.read_bytes())
    kind = data.randrange(KINDS_OF_DAMAGE)
    if kind == 0:
        for _ in range(data.choice((1, 1, 8))):
            entry[data.randrange(len(entry))] ^= 1 << data.randrange(8)
    elif kind == 1:
        del entry[data.randrange(len(entry)):]
    elif kind == 2:
        entry = bytearray(data.randbytes(data.randrange(100)))
    elif kind == 3:
        start = data.randrange(len(entry))
        entry[start:start + data.randrange(1, 50)] = bytes(data.randrange(50))
    elif kind == 4:     # a right checksum of anything
        entry = entry_of(data.choice((facts[:data.randrange(len(facts))], data.randbytes(9), b"{" * 2000, b'{"a":' * 3000, b"null",
                                      b"NaN", b'"\\ud800"', b"9" * 5000)))
    elif kind == 5:
        entry[32:40] = data.randbytes(8)
        entry[:32] = hashlib.sha256(entry[32:]).digest()
    else:
        file.unlink()
        data.choice((lambda: file.symlink_to("/etc/hostname"), file.mkdir, lambda: os.mkfifo(file), lambda: file.touch(0o000)))()
        return
    file.write_bytes(entry)


def fuzz(directory: Path, seed: int) -> None:
    """One damaged cache: values are right or not there, nothing raises, and at most one warning of a kind comes."""
    data = random.Random(seed)
    expected = {str(i): data.randbytes(data.randrange(200)) for i in range(3)}
    cache = DiskCache(directory, data.choice((SIZE, 5000)))
    for kernel, value in expected.items():
        assert cache.store({"kernel": kernel}, value)
    for kernel in data.sample(sorted(expected), data.randrange(1, 4)):
        damage(data, file_of(directory, {"kernel": kernel}), json.dumps({"kernel": kernel}).encode())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = DiskCache(directory, cache.size_limit)
        steps = [lambda: [None for kernel, value in expected.items() if cache.load({"kernel": kernel}) not in (None, value)],
                 lambda: [None for facts, value in cache.entries() if expected[facts["kernel"]] != value],
                 lambda: [None for kernel, value in expected.items()
                          if cache.store({"kernel": kernel}, value) and cache.load({"kernel": kernel}) != value],
                 lambda: [] if cache.volume() >= 0 else [None], lambda: cache.drop({"kernel": "0"}) or []]
        for step in data.sample(steps, len(steps)):
            assert step() == []
        assert 0 <= cache.clear() <= 3
    assert len({each.category for each in caught}) == len(caught)
    assert all(issubclass(each.category, RuntimeWarning) for each in caught)


def test_fuzzed_damage(tmp_path):
    seed = random.randrange(1 << 32)
    for each in range(seed, seed + 80):
        try:
            fuzz(tmp_path / str(each), each)
        except BaseException as error:
            raise AssertionError(f"seed {each}") from error


def forked(work) -> int:
    """The id of a process that does this, a thousand times quicker to start than one that imports torch; its status is 0 if it
    did."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        random.seed()
        work()
        status = 0
    finally:
        os._exit(status)


def test_killed_in_the_middle_of_a_write(tmp_path):
    def write_for_ever():
        cache = DiskCache(tmp_path, SIZE)
        for i in range(1_000_000):
            cache.store({"kernel": "k"}, bytes([i % 251]) * 1_000_000)

    for delay in (0.1, 0.105, 0.11):
        pid = forked(write_for_ever)
        while not file_of(tmp_path, {"kernel": "k"}).exists():
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        value = DiskCache(tmp_path, SIZE).load({"kernel": "k"})
        assert len(value) == 1_000_000 and len(set(value)) == 1
    cache = DiskCache(tmp_path, SIZE)
    assert cache.store({"kernel": "k"}, BINARY) and cache.load({"kernel": "k"}) == BINARY


def left_behind(directory, count):
    """What processes leave that are killed between opening a file and its last name."""
    def be_killed():
        os.replace = lambda *arguments, **named: os.kill(os.getpid(), signal.SIGKILL)
        DiskCache(directory, SIZE).store({"kernel": "k"}, BINARY)

    for _ in range(count):
        assert os.waitpid(forked(be_killed), 0)[1] == signal.SIGKILL
    files = list(directory.iterdir())
    assert len(files) == count
    return files


def test_what_killed_processes_leave_counts_and_leaves(tmp_path):
    first, second, third = left_behind(tmp_path, 3)
    cache = DiskCache(tmp_path, SIZE)
    assert cache.volume() > 3 * len(BINARY) and list(cache.entries()) == []
    os.utime(first, (0, 0))         # long ago
    assert cache.store(FACTS, BINARY)
    assert not first.exists() and second.exists()       # the other may still be written
    assert DiskCache(tmp_path, 2 * len(BINARY)).store(FACTS, BINARY)
    assert not second.exists() and not third.exists()   # it counts under the limit
    left_behind(tmp_path / "other", 2)
    assert DiskCache(tmp_path / "other", SIZE).clear() == 0 and list((tmp_path / "other").iterdir()) == []


def test_many_processes_at_once(tmp_path):
    """They read, write, evict and clear, and nobody sees half of anything or fails."""
    size, limit = 30_000, 400_000

    def check(kernel, value):
        assert value == bytes([kernel]) * size

    def use():
        warnings.simplefilter("error")
        cache, hits = DiskCache(tmp_path, limit), 0
        for i in range(400):
            kernel = random.randrange(20)
            if (value := cache.load({"kernel": kernel})) is not None:
                check(kernel, value)
                hits += 1
            else:
                cache.store({"kernel": kernel}, bytes([kernel]) * size)
            if i % 40 == 7:
                for facts, value in cache.entries():
                    check(facts["kernel"], value)
            if i % 100 == 50:
                random.choice((cache.clear, lambda: cache.drop({"kernel": kernel})))()
        assert hits

    processes = [forked(use) for _ in range(8)]
    assert [os.waitpid(pid, 0)[1] for pid in processes] == [0] * 8
    cache = DiskCache(tmp_path, limit)
    assert cache.store({"kernel": 0}, bytes(size)) and cache.volume() <= limit
    assert not list(tmp_path.glob("*.tmp"))


def test_no_descriptor_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    cache = DiskCache(tmp_path, SIZE)
    cache.store(FACTS, BINARY)
    file_of(tmp_path, {"kernel": "cut"}).write_bytes(b"")
    file_of(tmp_path, {"kernel": "folder"}).mkdir()
    with pytest.warns(DamageWarning):
        for kernel in ("cut", "folder", "none"):
            cache.load({"kernel": kernel})
    cache.load(FACTS)
    next(cache.entries())
    assert len(os.listdir("/proc/self/fd")) == before


def test_environment_names_the_place(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path / "here"))
    assert cache_directory() == tmp_path / "here"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_XE_CACHE_DIR", "here")
    assert cache_directory() == tmp_path / "here"
    for nothing in ("", None):
        monkeypatch.setenv("MOE_XE_CACHE_DIR", "") if nothing == "" else monkeypatch.delenv("MOE_XE_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_directory() == tmp_path / "moe_xe"


def test_the_users_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOE_XE_CACHE_DIR", "~/x")
    cache = DiskCache(cache_directory() / "kernels", SIZE)
    assert cache.directory == tmp_path / "home" / "x" / "kernels" and os.listdir(tmp_path) == ["home"]
    assert (tmp_path / "home" / "x").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("MOE_XE_CACHE_DIR", "~nobody_of_this_name/x")
    with pytest.raises(ValueError, match="MOE_XE_CACHE_DIR is a folder, not '~nobody_of_this_name/x'"):
        cache_directory()


def test_a_user_without_a_home_has_a_cache_of_his_own(tmp_path, monkeypatch):
    monkeypatch.delenv("MOE_XE_CACHE_DIR", raising=False)
    monkeypatch.setattr(disk_cache.platformdirs, "user_cache_dir", lambda *_, **__: "~/.cache/moe_xe")
    monkeypatch.setattr(disk_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache_directory() == tmp_path / f"moe_xe-{os.geteuid()}"
