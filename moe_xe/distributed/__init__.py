"""Expert parallelism on torch.distributed: tokens travel to the ranks of their experts, and what these make of them travels back."""
from .block import expert_parallel_moe
from .dispatch import Dispatched, combine, dispatch

__all__ = ["Dispatched", "combine", "dispatch", "expert_parallel_moe"]
