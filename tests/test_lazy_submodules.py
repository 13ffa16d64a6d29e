"""moe_xe.nn and moe_xe.integrations are there once moe_xe is imported, and other libraries only where they are asked for."""
import subprocess
import sys

import pytest

FORMS = [
    "import torch, moe_xe; assert callable(moe_xe.integrations.transformers.register)",
    "import moe_xe; assert moe_xe.integrations.ipex.GatedMLPMOE and moe_xe.integrations.vllm.XpuFusedMoe",
    "import moe_xe; assert moe_xe.nn.Experts and moe_xe.nn.gates and moe_xe.distributed.dispatch",
    "import sys, moe_xe; assert not {'moe_xe.distributed', 'moe_xe.nn', 'moe_xe.integrations', 'transformers'} & set(sys.modules)",
    "import sys, moe_xe; moe_xe.nn, moe_xe.integrations.transformers; assert 'transformers' not in sys.modules",
    "import moe_xe; assert {'distributed', 'nn', 'integrations', 'grouped_gemm'} <= set(dir(moe_xe))",
    "import moe_xe; assert {'ipex', 'transformers', 'vllm'} <= set(dir(moe_xe.integrations))",
]
RUNNER = """
import os, sys, torch
for form in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(form)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        print(form)
"""


@pytest.mark.full
def test_submodules():
    done = subprocess.run([sys.executable, "-c", RUNNER, *FORMS], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_names_that_are_not_there():
    import moe_xe

    for module in (moe_xe, moe_xe.integrations):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nonsense'"):
            module.nonsense
