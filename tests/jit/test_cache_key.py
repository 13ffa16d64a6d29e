from dataclasses import replace
from types import SimpleNamespace

import pytest

from moe_xe.disk_cache import key_of
from moe_xe.jit import cache_key, shipped_sources
from moe_xe.jit.cache_key import key_facts

DEVICE = dict(backend="opencl", name="a CPU", architecture="x86_64", driver_version="1", kind="cpu")


def key(source, **changes):
    return key_of(key_facts(source, SimpleNamespace(**DEVICE | changes)))


def test_equal_requests_have_equal_keys(vector_add):
    assert key(vector_add) == key(replace(vector_add))


@pytest.mark.parametrize("change", [{"name": "other"}, {"signature": "p"}, {"text": "other"}, {"options": ("-O0",)}])
def test_every_part_of_the_source_is_in_the_key(vector_add, change):
    assert key(replace(vector_add, **change)) != key(vector_add)


@pytest.mark.parametrize("fact", sorted(DEVICE))
def test_every_part_of_the_device_is_in_the_key(vector_add, fact):
    assert key(vector_add, **{fact: "other"}) != key(vector_add)


@pytest.mark.parametrize("distribution", ["moe_xe", "intel-sycl-rt"])
def test_versions_are_in_the_key(vector_add, monkeypatch, distribution):
    before, versions = key(vector_add), cache_key._version
    monkeypatch.setattr(cache_key, "_version", lambda name: "other" if name == distribution else versions(name))
    assert key(vector_add) != before


def test_cpu_isa_is_in_the_key_of_a_cpu_only(vector_add, monkeypatch):
    cpu, gpu = key(vector_add), key(vector_add, kind="gpu")
    monkeypatch.setattr(cache_key, "cpu_isa", lambda: "other")
    assert key(vector_add) != cpu
    assert key(vector_add, kind="gpu") == gpu


@pytest.mark.parametrize("edit", [
    lambda root: (root / "include" / "moe_xe" / "a.hpp").write_text("2"),
    lambda root: (root / "kernels" / "b.cpp").write_text("2"),
    lambda root: (root / "include" / "new.hpp").write_text(""),
    lambda root: (root / "kernels" / "b.cpp").rename(root / "kernels" / "c.cpp"),
])
def test_every_shipped_file_is_in_the_digest(tmp_path, monkeypatch, edit):
    (tmp_path / "include" / "moe_xe").mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "include" / "moe_xe" / "a.hpp").write_text("1")
    (tmp_path / "kernels" / "b.cpp").write_text("1")
    monkeypatch.setattr(shipped_sources, "sources_dir", lambda: tmp_path)
    digest = shipped_sources.sources_digest.__wrapped__
    before = digest()
    assert digest() == before
    edit(tmp_path)
    assert digest() != before
