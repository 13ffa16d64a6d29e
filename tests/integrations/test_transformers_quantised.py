"""Quantised checkpoints of Transformers' models: loaded, compared with the dense models that they are, saved and loaded again."""
from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import AutoModelForCausalLM  # noqa: E402

import moe_xe.integrations.transformers as integration  # noqa: E402
from moe_xe.nn.quantized import QuantizedParameter  # noqa: E402
from tests.integrations import checkpoints  # noqa: E402
from tests.integrations.test_transformers import _model, _one_torch_thread, _prompt  # noqa: E402, F401


def quantised(model) -> list[QuantizedParameter]:
    return [module for module in model.modules() if isinstance(module, QuantizedParameter)]


@pytest.fixture
def written(tmp_path, request):
    """Folders of a quantised and a dense checkpoint."""
    family, name = request.param
    model, folders = _model(family), (tmp_path / "quantised", tmp_path / "dense")
    checkpoints.write_gpt_oss(*folders, model) if family == "GptOss" else checkpoints.write(*folders, model, name)
    return folders


CHECKPOINTS = [("GptOss", "mxfp4"), ("Qwen3Moe", "gptq"), ("Mixtral", "int4"), *(
    pytest.param(("Qwen3Moe", name), marks=pytest.mark.full if name in ("auto-round", "gptq_v2_8bit", "int4_zeros") else ())
    for name in checkpoints.FORMATS if name != "gptq")]


@pytest.mark.parametrize("written", CHECKPOINTS, indirect=True, ids=lambda value: "-".join(getattr(value, "values", [value])[0]))
@torch.inference_mode()
def test_checkpoint(written, tmp_path):
    folder, dense_folder = written
    model, prompt = integration.load_quantized(folder, dtype=torch.float32), _prompt()
    dense = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32, experts_implementation="eager")
    expected, logits = dense(prompt, use_cache=False).logits, model(prompt, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    generation = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(prompt, **generation), dense.generate(prompt, **generation))
    assert len(quantised(model)) == 4 and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(tensor.is_meta for tensor in model.state_dict().values())

    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, experts_implementation="moe_xe")
    assert len(quantised(again)) == 4
    state, saved = again.state_dict(), model.state_dict()
    assert state.keys() == saved.keys()
    for name, tensor in saved.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name].float(), tensor.float()), name
    torch.testing.assert_close(again(prompt, use_cache=False).logits, logits, rtol=0, atol=0)
