"""moe-xe cache: what is listed, exported, imported and cleared, and the exit status."""
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from moe_xe.cli import app
from moe_xe.disk_cache import cache_directory
from moe_xe.jit.compiler import kernel_cache
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.plan.outer.config import OuterProblem
from moe_xe.plan.outer.heuristics import cpu_outer_config
from moe_xe.plan.problem import Dtype, GroupedGemmProblem
from moe_xe.runtime import devices
from moe_xe.tuning import Entry, default_store, tuning_key

PROBLEM, OUTER = GroupedGemmProblem(5760, 2880, Dtype.bf16, Dtype.bf16), OuterProblem(96, 64, Dtype.bf16, Dtype.f32)
DEFAULT, OUTER_DEFAULT = cpu_config(PROBLEM, "avx2"), cpu_outer_config("avx2")
CHOSEN = replace(DEFAULT, heights=(84,))


def run(*arguments):
    return CliRunner().invoke(app, ["cache", *map(str, arguments)])


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Two choices for this machine, and one for another driver."""
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path / "cache"))
    (cpu,) = (facts for facts in devices() if facts.kind == "cpu")
    key = tuning_key(cpu, "grouped_gemm", PROBLEM, 32, 8000, 3, DEFAULT)
    entry = Entry(CHOSEN, DEFAULT, {DEFAULT: 1500.0, CHOSEN: 1000.0})
    store = default_store()
    store.store(key, entry)
    store.store(tuning_key(cpu, "grouped_outer", OUTER, 32, 8000, "unread", OUTER_DEFAULT),
                Entry(OUTER_DEFAULT, OUTER_DEFAULT, {OUTER_DEFAULT: 70.0}))
    store.store(replace(key, driver="another"), entry)
    return tmp_path / "cache"


def test_list(directory):
    result = run("list")
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert sorted(line.split() for line in lines if "gemm 5760x2880" in line) == [
        ["gemm", "5760x2880,", "32", "experts", "8192", "3", "1500", "1000", "50%", here] for here in ("no", "yes")]
    assert lines.count("168x192") == lines.count("heights 84") == 2
    (outer,) = (place for place, line in enumerate(lines) if "outer 96x64" in line)
    assert lines[outer].split()[4:] == ["8192", "unread", "70", "70", "0%", "yes"] and lines[outer + 1:outer + 3] == ["336x384", "the same"]
    assert f"{directory}: 3 measured choices" in result.stdout and "kernels, 0.0 MB" in result.stdout


def test_list_as_json(directory):
    report = json.loads(run("list", "--json").stdout)
    assert report["directory"] == str(directory) == str(cache_directory())
    assert report["bytes"].keys() == {"kernels", "tuning"} and report["bytes"]["tuning"] > 0
    assert sorted((each["key"]["op"], each["speedup"], each["used_here"]) for each in report["entries"]) == [
        ("grouped_gemm", 1.5, False), ("grouped_gemm", 1.5, True), ("grouped_outer", 1.0, True)]
    assert all(Entry.from_dict(each["entry"]) for each in report["entries"])


def test_list_of_an_empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path / "new"))
    result = run("list")
    assert result.exit_code == 0 and f"{tmp_path / 'new'}: 0 measured choices" in result.stdout


def test_export_clear_import(tmp_path):
    before, file = dict(default_store().entries()), tmp_path / "choices.json"
    assert "3 measured choices written" in run("export", file).stdout
    assert "3 measured choices removed" in run("clear").stdout and not dict(default_store().entries())
    assert "3 measured choices read" in run("import", file).stdout
    assert dict(default_store().entries()) == before


def test_kernels_are_cleared_only_if_asked_for():
    kernel_cache().store({"kernel": "k"}, b"binary")
    assert "kernels" not in run("clear").stdout and kernel_cache().load({"kernel": "k"}) == b"binary"
    assert "1 kernels removed" in run("clear", "--kernels").stdout and kernel_cache().load({"kernel": "k"}) is None


@pytest.mark.parametrize("contents", ["", "{}", '{"format": "moe_xe tuning 1", "entries": [{}]}'])
def test_a_wrong_file_is_refused(tmp_path, contents):
    file, before = tmp_path / "choices.json", dict(default_store().entries())
    file.write_text(contents)
    result = run("import", file)
    assert result.exit_code == 1 and str(file) in result.stderr and result.stdout == ""
    assert dict(default_store().entries()) == before


def test_failures(tmp_path, monkeypatch):
    for arguments in (("import", tmp_path / "none.json"), ("export", tmp_path / "none" / "choices.json")):
        result = run(*arguments)
        assert result.exit_code == 1 and "No such file" in result.stderr
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name, reason in (("file", "cannot be opened"), ("open", "can be written by others")):
        monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path / name))
        for arguments in (("list",), ("clear",), ("export", tmp_path / "choices.json")):
            result = run(*arguments)
            assert result.exit_code == 1 and reason in result.stderr and result.stdout == ""
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path / "good"))
    for variable, value in (("MOE_XE_CACHE_SIZE", "²"), ("MOE_XE_CACHE_DIR", "~nobody_of_this_name")):
        monkeypatch.setenv(variable, value)
        result = run("list")
        assert result.exit_code == 1 and variable in result.stderr and result.stdout == ""


def test_damaged_choices_are_named_and_removed(directory):
    for file in sorted((directory / "tuning").iterdir())[:2]:
        file.write_bytes(file.read_bytes()[:-1])
    result = run("list")
    assert result.exit_code == 0 and "1 measured choices" in result.stdout and result.stderr.count("damaged entries") == 1
    assert len(list((directory / "tuning").iterdir())) == 1
    result = run("list")
    assert result.exit_code == 0 and result.stderr == ""


@pytest.mark.parametrize("value", ["\x1b]0;title\x07", "\ud800", "\x9b2J"], ids=["escape", "surrogate", "C1"])
def test_nothing_but_text_reaches_the_terminal(tmp_path, monkeypatch, value):
    """Whether it comes from an imported file, from the cache, or from a name."""
    def change(contents):
        for each in contents["entries"]:
            each["key"]["device"] = each["key"]["problem"]["n"] = value
            each["entry"]["default"] = f"{value} is no configuration"

    def add_field(contents):
        for each in contents["entries"]:
            config = json.dumps({"kind": "CpuConfig", value: 1})
            each["entry"] = {"config": config, "default": config, "microseconds": {config: 1}}

    outputs = []
    for edit in (change, add_field):
        run("export", tmp_path / "choices.json")
        contents = json.loads((tmp_path / "choices.json").read_text())
        edit(contents)
        (tmp_path / f"{edit.__name__}.json").write_text(json.dumps(contents))
        outputs.append(run("import", tmp_path / f"{edit.__name__}.json"))
        assert outputs[-1].exit_code == 1
    store = default_store()
    (key, entry), *_ = store.entries()
    store.disk.store(key.facts() | {"device": value}, json.dumps(entry.as_dict()).encode())
    outputs += [run("list"), run("list", "--json"), run("export", tmp_path / "again.json")]
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path / ("\udc9b" if value == "\ud800" else value)))
    outputs += [run("list"), run("import", tmp_path / "again.json"), run("clear")]
    assert [output.exit_code for output in outputs[2:]] == [0] * 6
    assert all(char.isprintable() or char == "\n" for output in outputs for char in output.output)
