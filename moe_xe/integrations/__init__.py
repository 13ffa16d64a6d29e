"""moe_xe inside other libraries; each file needs its library only when its functions are called."""
import importlib as _importlib

__all__ = ["ipex", "sglang", "torchtitan", "transformers", "vllm"]


def __getattr__(name: str):
    if name in __all__:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
