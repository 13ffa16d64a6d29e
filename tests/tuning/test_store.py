"""Tuning results on disk and in a file."""
import json
import warnings

import pytest

from moe_xe.disk_cache import DamageWarning, DiskCache
from moe_xe.plan.choice.block_config import MoeConfig
from moe_xe.tuning import Entry, TuningKey, TuningStore, default_store
from moe_xe.tuning.store import SIZE_LIMIT

from .example import DEFAULT, OUTER_DEFAULT, Device, config, entry, key


def store_in(directory) -> TuningStore:
    return TuningStore(DiskCache(directory, SIZE_LIMIT))


@pytest.fixture
def store(tmp_path) -> TuningStore:
    return store_in(tmp_path / "tuning")


def test_another_instance_reads_what_one_stored(store):
    assert store.load(key()) is None
    assert store.store(key(), entry())
    assert store_in(store.disk.directory).load(key()) == entry()
    assert dict(store_in(store.disk.directory).entries()) == {key(): entry()}
    assert store.store(key(), entry(3)) and store.load(key()) == entry(3)
    assert store.clear() == 1 and store.load(key()) is None


@pytest.mark.parametrize("other", [Device(driver_version="1.2.4"), Device(name="another CPU"), Device(xe_cores=16)])
def test_entry_of_another_driver_or_device_is_not_used(store, other):
    store.store(key(other), entry())
    assert store.load(key()) is None
    assert store.load(key(other)) == entry()


def test_speedup():
    assert entry().speedup == 1.25
    assert Entry(DEFAULT, DEFAULT, {DEFAULT: 3.0}).speedup == 1


def deep(levels: int) -> list:
    """A list in a list in a list ..., which JSON still reads; its repr is another matter."""
    inner = []
    for _ in range(levels):
        inner = [inner]
    return inner


def deep_config(levels: int) -> str:
    return '{"kind": "MoeConfig", "forward": ' * levels + "null" + "}" * levels


TITLED = json.dumps({"kind": "CpuConfig", "\x1b]0;title\x07": 1})     # would change a terminal's title


WRONG_ENTRIES = {
    "no object": [], "no times": {"config": "c", "default": "c"}, "more": entry().as_dict() | {"more": 1},
    "times": entry().as_dict() | {"microseconds": [1.0]},
    **{str(time): entry().as_dict() | {"microseconds": {text: time for text in entry().as_dict()["microseconds"]}}
       for time in (0, -1.0, "fast", True, None, float("nan"), float("inf"), 5e-324, 1e300)},
    "large time": entry().as_dict() | {"microseconds": {text: 10**400 for text in entry().as_dict()["microseconds"]}},
    "deep times": entry().as_dict() | {"microseconds": {"c": deep(900)}}, "deep": deep(900),
    "deep config": {"config": deep_config(400), "default": deep_config(400), "microseconds": {deep_config(400): 1.0}},
    "foreign fields": {"config": TITLED, "default": TITLED, "microseconds": {TITLED: 1.0}},
    "unmeasured": entry().as_dict() | {"config": Entry(config(5), config(5), {config(5): 1.0}).as_dict()["config"]},
    "two launches": Entry(MoeConfig(), MoeConfig(), {MoeConfig(): 1.0}).as_dict(),
    "two kinds": Entry(DEFAULT, DEFAULT, {DEFAULT: 1.0, OUTER_DEFAULT: 1.0}).as_dict(),
    "config": entry().as_dict() | {"config": 17}, "no config": {"config": "c", "default": "c", "microseconds": {"c": 1.0}}}


@pytest.mark.parametrize("wrong", WRONG_ENTRIES.values(), ids=WRONG_ENTRIES)
def test_wrong_entries_are_ignored_dropped_and_rewritten(store, wrong):
    store.store(key(), entry())
    for look in (lambda: store.load(key()), lambda: next(store.entries(), None)):
        store.disk.store(key().facts(), json.dumps(wrong).encode())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert look() is None
        assert len(caught) <= 1 and all("\x1b" not in str(each.message) for each in caught)
        assert store.disk.load(key().facts()) is None
    assert store.store(key(), entry()) and store.load(key()) == entry()


def test_entries_without_a_key_are_left_out_and_dropped(store):
    store.store(key(), entry())
    store.disk.store({"kernel": "k"}, b"binary")
    with pytest.warns(DamageWarning, match="a key must be an object"):
        assert dict(store.entries()) == {key(): entry()}
    assert store.disk.load({"kernel": "k"}) is None


def test_what_is_no_json_is_dropped(store):
    for wrong in (b"", b"\xff", b"[" * 100_000, b"1" * 100_000):
        store.disk.store(key().facts(), wrong)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DamageWarning)
            assert store.load(key()) is None
        assert store.disk.load(key().facts()) is None


WRONG_KEYS = {
    "escape": {"device": "\x1b]0;title\x07"}, "surrogate": {"driver": "\ud800"}, "line": {"op": "grouped_gemm\n"},
    "right to left": {"architecture": "\u202e"}, "large": {"rows_bucket": 10**400}, "large skew": {"skew_bucket": 1 << 63},
    "type": {"cores": "20"}, "bool": {"num_experts": True}, "skew": {"skew_bucket": "read"},
    "problem": {"problem": [1]}, "name": {"problem": {"\x1b[2J": 1}}, "value": {"problem": {"n": "\x1b[2J"}},
    "large value": {"problem": {"n": 10**400}}, "nan": {"problem": {"n": float("nan")}}, "list": {"problem": {"n": [1]}},
    "deep": {"problem": {"n": deep(900)}}, "deep field": {"op": deep(900)}}


@pytest.mark.parametrize("wrong", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_wrong_keys_are_refused_and_named(wrong):
    assert TuningKey.from_facts(key().facts()) == key()
    with pytest.raises(ValueError, match="of a key must|of a key's problem must") as caught:
        TuningKey.from_facts(key().facts() | wrong)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_export_and_import(store, tmp_path):
    entries = {key(): entry(), key(Device(driver_version="other")): entry(3)}
    for each in entries.items():
        store.store(*each)
    assert store.export_to(tmp_path / "file.json") == 2
    elsewhere = store_in(tmp_path / "elsewhere")
    elsewhere.store(key(), entry(4))
    elsewhere.store(key(num_experts=3), entry(5))
    assert elsewhere.import_from(tmp_path / "file.json") == 2
    assert dict(elsewhere.entries()) == entries | {key(num_experts=3): entry(5)}


def change(path, edit):
    contents = json.loads(path.read_text())
    edit(contents)
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize("edit, said", [
    (lambda contents: contents.update(format="moe_xe tuning 2"), "no export of tuning results"),
    (lambda contents: contents.pop("entries"), "no export of tuning results"),
    (lambda contents: contents["entries"].append(3), "entry 1: expected an object with key and entry"),
    (lambda contents: contents["entries"].append(contents["entries"][0] | {"key": {}}), "entry 1: a key must be"),
    *((lambda contents, wrong=wrong: contents["entries"].append(contents["entries"][0] | {"entry": WRONG_ENTRIES[wrong]}), said)
      for wrong, said in (("0", "entry 1: microseconds"), ("two kinds", "of one kind"), ("no config", "entry 1: "),
                          ("large time", "entry 1: microseconds"), ("deep", "entry 1: "), ("deep config", "entry 1: "))),
    *((lambda contents, wrong=wrong: contents["entries"].append({**contents["entries"][0], "key": contents["entries"][0]["key"] | wrong}),
       "entry 1: ") for wrong in WRONG_KEYS.values())])
def test_a_wrong_file_is_refused_as_a_whole(store, tmp_path, edit, said):
    path = tmp_path / "file.json"
    store.store(key(), entry())
    store.export_to(path)
    change(path, edit)
    elsewhere = store_in(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=said):
        elsewhere.import_from(path)
    assert list(elsewhere.entries()) == []


@pytest.mark.parametrize("contents", [b"", b"[", b"\xff", b"[]", b"null", b"[" * 100_000, b"1" * 100_000, b" " * 5000],
                         ids=["empty", "[", "no text", "list", "null", "deep", "large number", "long"])
def test_what_is_no_file_of_ours(store, tmp_path, contents, monkeypatch):
    monkeypatch.setattr("moe_xe.tuning.store.LARGEST_FILE", 4999 if contents.isspace() else 1 << 20)
    (tmp_path / "file.json").write_bytes(contents)
    with pytest.raises(ValueError, match="file.json is no"):
        store.import_from(tmp_path / "file.json")
    with pytest.raises(FileNotFoundError):
        store.import_from(tmp_path / "none.json")
    with pytest.raises(OSError):
        store.export_to(tmp_path / "none" / "file.json")


def test_import_says_what_could_not_be_written(store, tmp_path, monkeypatch):
    store.store(key(), entry())
    store.export_to(tmp_path / "file.json")
    monkeypatch.setattr(store.disk, "store", lambda *arguments: False)
    with pytest.raises(OSError, match="only 0 of 1 entries"):
        store.import_from(tmp_path / "file.json")


def test_environment_names_the_place(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path))
    assert default_store().disk.directory == tmp_path / "tuning"
