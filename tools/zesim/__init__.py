"""zesim: a simulated Arc B580 for the real SYCL runtime.

    tools/zesim/run moe-xe devices

or, in a process that has not used SYCL yet: os.environ.update(zesim.environment()).
"""
from .card import environment, missing_tools

__all__ = ["environment", "missing_tools"]
