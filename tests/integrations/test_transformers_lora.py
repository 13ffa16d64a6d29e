"""Models of Transformers with LoraExperts inside, saved and loaded."""
from __future__ import annotations

import pytest
import torch

from moe_xe.nn import LoraExperts, Qwen3MoeBlock

transformers = pytest.importorskip("transformers", minversion="5.23")

from tests.integrations.test_transformers import _model, _prompt  # noqa: E402


def _adapt(model, block=None):
    for module in list(model.modules()):
        if block is not None and type(getattr(module, "mlp", None)).__name__ == block.hf_class:
            module.mlp = block.from_hf(module.mlp)
    adapted = [module for module in model.modules() if hasattr(module, "experts")]
    for module in adapted:
        module.experts = LoraExperts(module.experts, 4)
        for b in module.experts.lora_B.values():
            torch.nn.init.normal_(b, std=0.3)
    assert len(adapted) == 2
    return adapted


@pytest.mark.few(2)
@pytest.mark.parametrize("name, block", [("Qwen3Moe", None), ("GptOss", None), ("Mixtral", None), ("Qwen3Moe", Qwen3MoeBlock)])
@torch.no_grad()
def test_saved_and_loaded(name, block, tmp_path):
    """Without LoraExperts it is the model as it was before; with them, or with merged adapters, as it is now."""
    def logits(model):
        return model(prompt, use_cache=False).logits

    def loaded(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moe_xe").eval()

    model, prompt = _model(name), _prompt()
    before = logits(model)
    adapted = _adapt(model, block)
    now = logits(model)
    assert (now - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapted")
    other = loaded(tmp_path / "adapted")
    torch.testing.assert_close(logits(other), before, rtol=1e-5, atol=1e-5)

    _adapt(other, block)
    adapters = {key: value for key, value in model.state_dict().items() if ".lora_" in key}
    assert not other.load_state_dict(adapters, strict=False).unexpected_keys and len(adapters) == 8
    torch.testing.assert_close(logits(other), now, rtol=1e-5, atol=1e-5)

    for module in adapted:
        module.experts = module.experts.merge()
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), now, rtol=1e-3, atol=1e-3)
