"""Every device test runs on each device that is there: the SYCL CPU device always, torch's XPU where there is one."""
import pytest
import torch

DEVICES = ["cpu"] + (["xpu"] if torch.xpu.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


def pytest_report_header():
    return f"moe_xe devices: {', '.join(DEVICES)}"
