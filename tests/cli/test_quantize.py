"""moe-xe quantize: what is written, that it loads, what is done again, and what is refused."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers", minversion="5.23")

from moe_xe import QuantizedWeight  # noqa: E402
from moe_xe.cli import app  # noqa: E402
from moe_xe.integrations.transformers import load_quantized  # noqa: E402
from moe_xe.nn.quantized import QuantizedParameter, weight_of  # noqa: E402
from moe_xe.quantized.folder import WRITTEN  # noqa: E402
from tests.integrations.test_transformers import MODELS, _config, _model, _one_torch_thread, _prompt  # noqa: E402, F401


def run(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def saved(folder, family="Qwen3Moe", shard_size="200KB"):
    model = _model(family, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text("{}")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model


def experts_of(model):
    return [(module, name) for module in model.modules() if hasattr(module, "is_concatenated") for name in ("gate_up_proj", "down_proj")]


@pytest.mark.parametrize("family, format, group, method", [
    ("Qwen3Moe", "int4", 32, "compressed-tensors"), ("Qwen3Moe", "mxfp4", None, "compressed-tensors"), ("Mixtral", "fp8", 16, "fp8"),
    ("GptOss", "mxfp4", None, "mxfp4"), ("GptOss", "int4", 16, "moe_xe")])
def test_quantised_model(family, format, group, method, tmp_path):
    source, target = tmp_path / "dense", tmp_path / "quantised"
    dense = saved(source, family)
    options = [] if group is None else ["--group", group]
    report = ["--report"] if (family, format) == ("Qwen3Moe", "int4") else ["--no-report"]
    done = run(source, target, "--format", format, *options, *report, "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["bytes"]["quantised"] < printed["bytes"]["dense"] == sum(file.stat().st_size for file in source.glob("*.safetensors"))
    if "--report" in report:
        assert 0 < printed["logits"]["error"] < 0.5 and 0 < printed["logits"]["same_token"] <= 1
    assert json.loads((target / "config.json").read_text())["quantization_config"]["quant_method"] == method
    assert {file.name for file in target.iterdir()} == {file.name for file in source.iterdir()}

    model = load_quantized(target)
    for (module, name), (theirs, _) in zip(experts_of(model), experts_of(dense), strict=True):
        weight, w = weight_of(module, name), getattr(theirs, name).detach()
        codes, usual = WRITTEN[format]
        rows_and_columns = (group, group) if format == "fp8" else (1, group or usual)
        expected = QuantizedWeight.quantize(w.mT.contiguous() if module.is_transposed else w, codes, rows_and_columns,
                                            scale_dtype=w.dtype if format == "int4" else None)
        assert torch.equal(weight.dequantize(), (expected.mT if module.is_transposed else expected).dequantize()), name
    others = {name: tensor for name, tensor in dense.state_dict().items() if not name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in others.items())


@pytest.mark.few(1)
@pytest.mark.parametrize("family", sorted(MODELS.keys() - {"GraniteMoe"}))      # whose experts have other names
@torch.inference_mode()
def test_families(family, tmp_path):
    """By their own names of experts, in one tensor or in one for each: what is loaded computes what the dense model does with its numbers."""
    dense, prompt = _model(family), _prompt()
    dense.save_pretrained(tmp_path / "dense")
    assert run(tmp_path / "dense", tmp_path / "quantised", "--format", "int4", "--group", 16, "--no-report").exit_code == 0
    model = load_quantized(tmp_path / "quantised", dtype=torch.float32)
    quantised = {name: module.weight for name, module in model.named_modules() if isinstance(module, QuantizedParameter)}
    assert quantised
    for name, weight in quantised.items():
        dense.get_parameter(name).copy_(weight.dequantize())
    logits = model(prompt, use_cache=False).logits
    torch.testing.assert_close(logits, dense(prompt, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_the_report_of_a_new_process(tmp_path):
    """In which nothing has registered moe_xe with Transformers before."""
    saved(tmp_path / "dense")
    command = [sys.executable, "-m", "moe_xe.cli", "quantize", tmp_path / "dense", tmp_path / "int4", "--format", "int4", "--group", "32", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert 0 < json.loads(done.stdout)["logits"]["error"] < 0.5, done.stderr


def test_what_is_done_is_not_done_again(tmp_path):
    source, target = tmp_path / "dense", tmp_path / "quantised"
    saved(source)
    assert run(source, target, "--format", "fp8", "--no-report").exit_code == 0
    files = sorted(target.glob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in files]
    whole = {file.name: load_file(file) for file in files}
    files[0].unlink(), (target / "config.json").unlink()        # as a run that was killed leaves it
    (target / f".{files[0].name}.tmp").write_bytes(b"half")
    assert run(source, target, "--format", "fp8", "--no-report").exit_code == 0
    assert [file.stat().st_mtime_ns for file in files][1:] == times[1:] and files[0].stat().st_mtime_ns > times[0]
    again = load_file(files[0])
    before = whole[files[0].name]
    assert again.keys() == before.keys() and all(torch.equal(again[name].float(), w.float()) for name, w in before.items())
    assert (target / "config.json").is_file() and not list(target.glob(".*"))
    assert run(source, target, "--format", "fp8", "--group", 64, "--no-report").exit_code == 0
    assert all(file.stat().st_mtime_ns > time for file, time in zip(files, times))


@pytest.mark.full
def test_memory_is_that_of_a_shard(tmp_path):
    config = _config("Qwen3Moe", **MODELS["Qwen3Moe"] | dict(num_experts=32, moe_intermediate_size=256, hidden_size=512))
    for name, layers in (("tiny", 1), ("large", 12)):
        config.num_hidden_layers, config.layer_types = layers, None
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / name, max_shard_size="50MB")
    shards = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    program = f"""
import torch
from pathlib import Path
from moe_xe.quantized.folder import quantize_folder
from tests.anonymous_memory import printed_peak
torch.set_num_threads(1)
folder = Path({str(tmp_path)!r})
list(quantize_folder(folder / "tiny", folder / "tiny8", "fp8"))
with printed_peak():
    list(quantize_folder(folder / "large", folder / "large8", "fp8"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert len(shards) > 5 and int(done.stdout) < 1.2 * max(shards), (done.stdout, shards)


@pytest.mark.parametrize("arguments, words", [
    (["--format", "int3"], "format must be one of int4, mxfp4, fp8, got 'int3'"),
    (["--format", "mxfp4", "--group", "16"], "group must be 32 for mxfp4, got 16"),
    (["--group", "0"], "group must be positive for int4, got 0"),
    (["--group", "48"], "experts.0.down_proj.weight must have a K that the group 48 divides, got 32")])
def test_wrong_arguments(arguments, words, tmp_path):
    saved(tmp_path / "dense")
    done = run(tmp_path / "dense", tmp_path / "quantised", *arguments)
    assert done.exit_code == 1 and words in done.stderr and not (tmp_path / "quantised" / "config.json").exists()


def test_folders_that_are_no_dense_moe(tmp_path):
    done = run(tmp_path, tmp_path / "quantised")
    assert done.exit_code == 1 and "must be a model's folder, it has no config.json" in done.stderr
    saved(tmp_path / "dense")
    done = run(tmp_path / "dense", tmp_path / "dense")
    assert done.exit_code == 1 and "must have a folder of its own" in done.stderr
    assert run(tmp_path / "dense", tmp_path / "quantised", "--group", 32, "--no-report").exit_code == 0
    done = run(tmp_path / "quantised", tmp_path / "twice")
    assert done.exit_code == 1 and "must be a dense model, its quant_method is 'compressed-tensors'" in done.stderr
    damaged = next((tmp_path / "dense").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    done = run(tmp_path / "dense", tmp_path / "other")
    assert done.exit_code == 1 and f"{damaged.name} must be a safetensors file, it cannot be read" in done.stderr
    os.unlink(damaged)
    done = run(tmp_path / "dense", tmp_path / "other")
    assert done.exit_code == 1 and "must have the file model-0" in done.stderr
