"""The sparse blocks of model families: Transformers' parameters and outputs, moe_xe's routing and fused experts."""
from .deepseek_v3 import DeepseekV3Block
from .gpt_oss import GptOssBlock
from .llama4 import Llama4Block
from .lora import LoraExperts
from .mixtral import MixtralBlock
from .parts import Experts, GatedMLP, MoeBlock
from .qwen3_moe import Qwen3MoeBlock

__all__ = ["DeepseekV3Block", "ExpertParallel", "Experts", "GatedMLP", "GptOssBlock", "Llama4Block", "LoraExperts", "MixtralBlock",
           "MoeBlock", "Qwen3MoeBlock"]


def __getattr__(name: str):
    if name == "ExpertParallel":        # torch.distributed.tensor takes a second to import
        from .parallel import ExpertParallel
        return ExpertParallel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
