"""moe-xe predict --ranks."""
import json

import pytest
from typer.testing import CliRunner

from moe_xe.bench import predictions, workloads
from moe_xe.cli import app
from moe_xe.plan.block.exchange import preferred_chunks
from moe_xe.plan.model.devices import record_named
from moe_xe.plan.model.links import LINKS, NETWORKS
from moe_xe.plan.problem import Dtype, WeightLayout


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(predictions, "MOST_TOKENS", 256)
    monkeypatch.setattr(predictions, "DRAWN_TOKENS", 256)
    monkeypatch.setitem(workloads.MODELS, "tiny", workloads.Model("tiny", 512, 256, 16, 2))


def run(*arguments):
    return CliRunner().invoke(app, ["predict", "--model", "tiny", *(str(argument) for argument in arguments)])


def test_layers():
    report = json.loads(run("--ranks", "1,4,16", "--tokens", "1,512", "--chunks", 1, "--json").stdout)
    assert report["predicted"] is True and (report["link"], report["network"]) == ("pcie5x8", "ib400-shared")
    found = {(layer["ranks"], layer["tokens"]): layer for layer in report["layers"]}
    assert list(found) == [(ranks, tokens) for ranks in (1, 4, 16) for tokens in (1, 512)]
    for (ranks, _), layer in found.items():
        assert layer["ms"] == pytest.approx(layer["compute_ms"] + layer["communication_ms"])
        assert layer["share"] == pytest.approx(1 - layer["compute_ms"] / layer["ms"]) and (layer["share"] > 0) == (ranks > 1)
        assert layer["sent_bytes"] <= layer["pair_bytes"] * 1.05 and layer["hidden_from"] is None
    block = json.loads(run("--block", "--tokens", "1", "--json").stdout)["blocks"][0]
    assert found[1, 1]["ms"] == block["ms"]


def test_codes_are_fewer_bytes():
    arguments = ("--ranks", 2, "--tokens", 64, "--chunks", 1, "--json")
    plain, there, both = (json.loads(run(*arguments, *wires).stdout)["layers"][0]["sent_bytes"] for wires in (
        (), ("--wire", "int8"), ("--wire", "fp8_e4m3", "--wire-back", "int8")))
    rows = plain / (1088 + 1024)        # ids and weights of two experts are 16 bytes; messages are multiples of 64
    assert (there, both) == pytest.approx((rows * (576 + 1024), rows * (576 + 576)))


def test_chunks():
    """By default as many as expert_parallel_moe takes; there are no more than tokens."""
    arguments = ("--ranks", 8, "--json", "--tokens")
    chosen, = json.loads(run(*arguments, 65536).stdout)["layers"]
    assert chosen["chunks"] == preferred_chunks(65536, 2, 2) > 1 and chosen["hidden"] > 0
    one, = json.loads(run(*arguments, 65536, "--chunks", 1).stdout)["layers"]
    assert one["chunks"] == 1 and one["hidden"] == 0 and one["compute_ms"] == chosen["compute_ms"] and one["share"] > chosen["share"]
    assert json.loads(run(*arguments, 3, "--chunks", 8).stdout)["layers"][0]["chunks"] == 3


def test_from_where_on_communication_hides(monkeypatch):
    monkeypatch.setattr(predictions.LayerPrediction, "hidden", property(lambda layer: 0.5 if layer.seconds > least else 0.4))
    layers = predictions.Layers(workloads.MODELS["tiny"], record_named("b60"), Dtype.bf16, WeightLayout.enk, quantization=None, int8_rows=False,
                                link=LINKS["pcie5x8"], network=NETWORKS["ib400"])
    least = layers.predict(4, 32, 1).seconds
    assert layers.hidden_from(4, 1) == 64
    least = layers.predict(4, 256, 1).seconds
    assert layers.hidden_from(4, 1) is None


def test_one_rank_is_what_there_was():
    for arguments in (("--tokens", "1,64"), ("--tokens", "64", "--block")):
        assert run(*arguments, "--ranks", 1).stdout == run(*arguments).stdout != ""


def test_what_is_printed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output = run("--ranks", "1,64", "--tokens", "4096", "--chunks", 2).stdout
    assert "PREDICTED, not measured: Arc Pro B60" in output and "64 ranks: half of the communication hides for no number of tokens" in output
    assert max(map(len, output.splitlines())) <= 80


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    assert run("--ranks", "1,2", "--tokens", "1,64", "--chunks", 1, "--plot", picture, "--json").exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, named", [
    (("--ranks", "0"), "--ranks"), (("--ranks", "two"), "--ranks"), (("--ranks", 2, "--link", "usb"), "--link"),
    (("--ranks", 2, "--network", "lan"), "--network"), (("--ranks", 2, "--device", "lunar-lake"), "--link"),
    (("--ranks", 2, "--device", "cpu"), "--device"), (("--ranks", 2, "--chunks", 0), "--chunks"), (("--ranks", 2, "--dtype", "int8"), "--dtype"),
    (("--ranks", 2, "--check"), "--check"), (("--ranks", 2, "--wire", "int4"), "--wire"), (("--ranks", 2, "--wire-back", "bf16"), "--wire-back")])
def test_wrong_options_are_named(arguments, named):
    result = run(*arguments)
    assert result.exit_code == 2 and named in result.output
