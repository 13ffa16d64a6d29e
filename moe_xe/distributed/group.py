"""The group of ranks that share the experts."""
from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["device_of", "group_of", "usual_device"]


def group_of(group) -> dist.ProcessGroup:
    """A ProcessGroup, or that of a DeviceMesh of one dimension; None: the default group. TypeError or ValueError where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group must be initialised, but torch.distributed has no process group; call init_process_group first")
    if group is None:
        return dist.group.WORLD
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a DeviceMesh of one dimension, got {group}; take the one of the experts, mesh[name]")
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must have this rank in it, got GroupMember.NON_GROUP_MEMBER")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    return group


def device_of(group: dist.ProcessGroup, name: str, tensor) -> torch.device:
    """The tensor's, if the group can send from there. TypeError or ValueError naming it, before anything is sent."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if torch.compiler.is_compiling():       # dynamo does not look into groups
        return tensor.device
    kinds = [device.type for device in group._device_types]
    if kinds and tensor.device.type not in kinds:       # a group written in Python has none
        raise ValueError(f"{name} must be on a device of the group, {' or '.join(kinds)}, got {tensor.device}")
    return tensor.device


def usual_device(group: dist.ProcessGroup) -> torch.device:
    """From where ranks send, as far as one knows that has no tensor to send."""
    return torch.device("xpu" if torch.xpu.is_available() and torch.device("xpu") in group._device_types else "cpu")
