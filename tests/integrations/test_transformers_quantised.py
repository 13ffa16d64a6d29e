"""Quantised checkpoints of Transformers' models: loaded, compared with the dense models that they are, saved and loaded again."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import AutoModelForCausalLM  # noqa: E402

import moe_xe.integrations.transformers as integration  # noqa: E402
from moe_xe.nn import LoraExperts  # noqa: E402
from moe_xe.nn.quantized import QuantizedParameter  # noqa: E402
from tests.integrations import checkpoints  # noqa: E402
from tests.integrations.test_transformers import HIDDEN, MODELS, _config, _model, _one_torch_thread, _prompt, _routing  # noqa: E402, F401


def quantised(model) -> list[QuantizedParameter]:
    return [module for module in model.modules() if isinstance(module, QuantizedParameter)]


@pytest.fixture
def written(tmp_path, request):
    """Folders of a quantised and a dense checkpoint."""
    family, name = request.param
    folders = tmp_path / "quantised", tmp_path / "dense"
    if family == "GptOss":      # down_proj is square, as the published models' is: no shape tells its transpose
        config = _config(family, **MODELS[family] | dict(intermediate_size=HIDDEN))
        checkpoints.write_gpt_oss(*folders, AutoModelForCausalLM.from_config(config))
    else:
        checkpoints.write(*folders, _model(family), name)
    return folders


def cases():
    for name in checkpoints.FORMATS:
        if name != "fp8_experts":
            yield pytest.param(("Qwen3Moe", name), marks=() if name in ("gptq", "awq", "fp8") else pytest.mark.full)
    yield from (("GptOss", "mxfp4"), ("Mixtral", "int4"))


@pytest.mark.parametrize("written", list(cases()), indirect=True, ids="-".join)
@torch.inference_mode()
def test_checkpoint(written, tmp_path):
    folder, dense_folder = written
    model, prompt = integration.load_quantized(folder, dtype=torch.float32), _prompt()
    dense = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32, experts_implementation="eager")
    expected, logits = dense(prompt, use_cache=False).logits, model(prompt, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    generation = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(prompt, **generation), dense.generate(prompt, **generation))
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, QuantizedParameter)]
    assert names == 2 * ["gate_up_proj", "down_proj"]
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(tensor.is_meta for tensor in model.state_dict().values())

    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, experts_implementation="moe_xe")
    assert len(quantised(again)) == 4
    state, saved = again.state_dict(), model.state_dict()
    assert list(state) == list(saved)
    for name, tensor in saved.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name].float(), tensor.float()), name
    torch.testing.assert_close(again(prompt, use_cache=False).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("written", [("Qwen3Moe", "int4")], indirect=True)
def test_experts_compile_without_graph_breaks(written):
    torch.compiler.reset()
    experts = integration.load_quantized(written[0], dtype=torch.float32).model.layers[0].mlp.experts
    (ids, weights), x = _routing(5), torch.randn(5, HIDDEN)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ids, weights), experts(x, ids, weights), rtol=1e-5, atol=1e-5)
    assert integration.fused_activation(experts) is not None


@pytest.mark.full
@pytest.mark.parametrize("written", [("Qwen3Moe", "int4")], indirect=True)
def test_adapters_learn_on_quantised_experts(written):
    """A tiny model that has to repeat a text: the loss falls to less than half, and is within 5 % of that on the dense weights which the
    codes are."""
    prompt, losses = _prompt(), {}
    for name, load, folder in zip(("quantised", "dense"), (integration.load_quantized, AutoModelForCausalLM.from_pretrained), written):
        torch.manual_seed(5)
        model = load(folder, dtype=torch.float32, experts_implementation="moe_xe").requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.experts = LoraExperts(layer.mlp.experts, 4, 8, dtype=torch.float32)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(trained) == 8
        optimizer = torch.optim.AdamW(trained, lr=0.03)
        for _ in range(30):
            loss = model(prompt, labels=prompt, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(name, []).append(loss.item())
    ours, theirs = losses["quantised"], losses["dense"]
    assert ours[-1] < 0.5 * ours[0]
    assert abs(ours[-1] - theirs[-1]) < 0.05 * theirs[-1], (ours, theirs)


@pytest.mark.parametrize("change, error, words", [
    (dict(quantization_config=None), ValueError, "model must have a quantization_config in its config.json"),
    (dict(quantization_config={"quant_method": "bitsandbytes"}), ValueError, "quant_method must be one of mxfp4, fp8, .*, got 'bitsandbytes'"),
    (dict(quantization_config={"quant_method": "fp8"}), ValueError, "must have weights weight_scale_inv and weight, .* it has none of the model's")])
@pytest.mark.parametrize("written", [("Qwen3Moe", "awq")], indirect=True)
def test_checkpoints_that_are_not_supported(written, change, error, words):
    path = written[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=words):
        integration.load_quantized(written[0])


@pytest.mark.parametrize("written", [("Qwen3Moe", "fp8")], indirect=True)
def test_codes_that_are_no_numbers(written):
    for path in written[0].glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("1.mlp.experts.5.up_proj.weight"):
                tensor.view(torch.uint8)[3, 2] = 0xFF
        save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1.mlp.experts.0.up_proj.weight cannot be loaded: codes must be finite numbers, but codes\[5, 3, 2\] is 0xff"):
        integration.load_quantized(written[0])


def test_experts_that_cannot_be_chosen(tmp_path):
    """Llama-4's, which are no class under use_experts_implementation."""
    transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=48, intermediate_size_mlp=80, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, interleave_moe_layer_step=1, pad_token_id=0)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    scales = {f"{name}_scale_inv": torch.ones(4, 1, 1) for name in tensors if name.endswith("experts.down_proj")}
    save_file(tensors | scales, tmp_path / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="experts.down_proj must be .* of experts that Transformers lets be chosen.*Llama4TextExperts"):
        integration.load_quantized(tmp_path)


@pytest.mark.parametrize("written", [("Qwen3Moe", "gptq")], indirect=True)
def test_tensors_that_are_not_supported(written):
    """The weight is named."""
    for path in written[0].glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("experts.5.up_proj.g_idx"):
                tensors[name] = tensors[name].flip(0)
        save_file(tensors, path)
    with pytest.raises(ValueError, match=r"model.layers.\d.mlp.experts.0.up_proj.weight cannot be loaded: g_idx must be k // 32"):
        integration.load_quantized(written[0])
    with pytest.raises(ValueError, match='experts_implementation must be "moe_xe", which alone can compute them, got \'eager\''):
        integration.load_quantized(written[0], experts_implementation="eager")
    with pytest.raises(ValueError, match="state_dict must be left out, got dict"):
        integration.load_quantized(written[0], state_dict={})


@pytest.mark.full
def test_loading_takes_little_more_than_the_packed_size(tmp_path):
    """GPTQ's codes are transposed, of which no more than one weight at a time may be there twice."""
    sizes = dict(num_experts=32, moe_intermediate_size=384, hidden_size=512, num_hidden_layers=24)
    config = _config("Qwen3Moe", **MODELS["Qwen3Moe"] | sizes)
    folders = [tmp_path / "tiny", tmp_path / "large"]
    for folder, layers in zip(folders, (1, config.num_hidden_layers)):
        config.num_hidden_layers, config.layer_types = layers, None
        checkpoints.write_random_gptq(folder, AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    size = sum(path.stat().st_size for path in folders[1].glob("*.safetensors"))
    program = f"""
import torch
from moe_xe.integrations.transformers import load_quantized
from tests.anonymous_memory import printed_peak
load_quantized({str(folders[0])!r}, dtype=torch.bfloat16)      # imports what loading needs
with printed_peak():
    model = load_quantized({str(folders[1])!r}, dtype=torch.bfloat16)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}      # what is freed is gone, as it is of the large tensors of real models
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
                          env=environment)
    assert size > 1e8 and int(done.stdout) < 1.2 * size, (done.stdout, size)
