import json
import statistics

import pytest
from typer.testing import CliRunner

from moe_xe.cli import app

FIELDS = {"device", "model", "n", "k", "tokens", "rows", "config", "ms", "tflops", "roofline", "bound_by", "parts_ms"}


def run(*arguments):
    return CliRunner().invoke(app, ["predict", *(str(argument) for argument in arguments)])


def test_predictions_say_that_they_are():
    result = run("--device", "b60", "--model", "qwen3", "--tokens", "1,64")
    assert result.exit_code == 0 and "PREDICTED, not measured" in result.output and "Arc Pro B60" in result.output


@pytest.mark.parametrize("device, layout", [pytest.param("b70", "enk", marks=pytest.mark.full), ("max1550", "ekn"), ("lunar-lake", "enk")])
def test_both_gemms_of_each_model(device, layout):
    report = json.loads(run("--device", device, "--model", "qwen3,gpt-oss", "--tokens", "1,1024", "--layout", layout, "--gathered",
                            "--json").stdout)
    assert report["predicted"] is True and report["layout"] == layout and len(report["cases"]) == 8
    for case in report["cases"]:
        assert set(case) == FIELDS and 0 < case["roofline"] <= 1 and case["bound_by"] in case["parts_ms"]
        assert case["ms"] >= max(value for part, value in case["parts_ms"].items() if part not in ("latency", "issue", "L1", "tail")) * 0.999


@pytest.mark.parametrize("y_dtype, size", [(None, 2), ("fp32", 4), ("bf16", 2)])
def test_blocks(y_dtype, size):
    arguments = ["--block", "--device", "b60", "--model", "qwen3", "--tokens", "1,1024"] + (["--y-dtype", y_dtype] if y_dtype else [])
    report = json.loads(run(*arguments, "--json").stdout)
    assert report["predicted"] is True and [block["tokens"] for block in report["blocks"]] == [1, 1024]
    for block in report["blocks"]:
        assert block["ms"] == pytest.approx(sum(block["parts_ms"].values()))
        assert set(block["parts_ms"]) == {"launches", "route", "sort", "gate_up", "down", "combine"} and block["launches"] == (2 if block["tokens"] == 1 else 5)
        assert block["y_bytes"] == 8 * block["tokens"] * 2048 * size
    output = run(*arguments).output
    assert "PREDICTED, not measured" in output and "launches" in output and "qwen3-30b-a3b" in output


@pytest.mark.full
def test_blocks_beside_published_layers():
    report = json.loads(run("--block", "--check", "--json").stdout)
    speedups = [layer["measured_ms"] / layer["ms"] for layer in report["layers"]]
    assert len(speedups) == 49 and [layer["speedup"] for layer in report["layers"]] == pytest.approx(speedups)
    assert report["mean_speedup"] == pytest.approx(statistics.geometric_mean(speedups))
    assert f"geometric mean of 49 layers: {report['mean_speedup']:.2f}" in run("--block", "--check").output


def test_more_tokens_take_longer():
    cases = json.loads(run("--model", "mixtral", "--tokens", "1,16,256,4096", "--json").stdout)["cases"]
    times = [case["ms"] for case in cases if case["n"] == 28672]
    assert times == sorted(times)


def test_the_cpu_device_is_measured():
    cases = json.loads(run("--device", "cpu", "--model", "qwen3", "--tokens", "1", "--json").stdout)["cases"]
    assert [(case["n"], case["k"]) for case in cases] == [(1536, 2048), (2048, 768)]
    assert all(set(case["parts_ms"]) == {"multiply-add", "memory", "tail"} and case["ms"] > 0 for case in cases)


def test_check():
    report = json.loads(run("--check", "--json").stdout)
    assert report["within_25_percent"] >= 0.8 * len(report["points"]) and all(point["source"] for point in report["points"])
    quantised = [point for point in report["points"] if " 4-bit, " in point["case"] or " fp8, " in point["case"]]
    assert len(quantised) == 30 and all(point["own_predicted_ms"] < point["measured_ms"] for point in quantised)
    assert "published points are predicted within 25 %" in run("--check").output


@pytest.mark.parametrize("arguments", [("--tokens", "1,64"), ("--check",)])
def test_plots(tmp_path, arguments):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    assert run(*arguments, "--plot", picture, "--json").exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written(tmp_path):
    pytest.importorskip("matplotlib")
    result = run("--tokens", 1, "--plot", tmp_path / "nowhere" / "picture.png")
    assert result.exit_code == 1 and "nowhere" in result.output.replace("\n", "")


@pytest.mark.parametrize("arguments, named", [(("--device", "a770"), "--device"), (("--device", "max"), "--device"), (("--model", "gpt-9"), "--model"),
                                              (("--model", "qwen3,"), "--model"), (("--tokens", "0"), "--tokens"), (("--tokens", "x"), "--tokens"),
                                              (("--dtype", "int8"), "--dtype"), (("--layout", "nek"), "--layout"),
                                              (("--block", "--dtype", "int8"), "--dtype"), (("--block", "--y-dtype", "fp16"), "--y-dtype"),
                                              (("--block", "--device", "cpu"), "--device")])
def test_wrong_options_are_named(arguments, named):
    result = run(*arguments)
    assert result.exit_code == 2 and named in result.output
