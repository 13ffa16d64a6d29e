"""moe_xe.grouped_gemm is the function, and a package to import from, whichever is asked for first."""
import subprocess
import sys

import pytest

FORMS = {
    "the function": "import moe_xe; assert callable(moe_xe.grouped_gemm) and 'tokens_per_expert' in moe_xe.grouped_gemm.__doc__",
    "the function by name": "from moe_xe import grouped_gemm; assert grouped_gemm.__module__ == 'moe_xe.ops.gemm.grouped_gemm'",
    "from the package's module": "from moe_xe.grouped_gemm.interface import grouped_gemm, grouped_gemm_forward; "
                                 "assert grouped_gemm.__module__ == 'moe_xe.grouped_gemm.interface'",
    "module under another name": "import moe_xe.grouped_gemm.interface as i; assert callable(i.grouped_gemm_forward)",
    "module of a module": "import moe_xe.grouped_gemm.reference.moe_block as b; assert b.Qwen3MoeFusedGroupedGEMMBlock",
    "from a module of a module": "from moe_xe.grouped_gemm.reference.moe_ops import permute, unpermute",
    "module by name": "from moe_xe.grouped_gemm import interface, reference; assert interface.grouped_gemm",
    "attributes": "import moe_xe; assert moe_xe.grouped_gemm.interface.grouped_gemm; "
                  "import moe_xe.grouped_gemm.reference.moe_ops; assert moe_xe.grouped_gemm.reference.moe_ops.permute",
    "by string": "import importlib; assert importlib.import_module('moe_xe.grouped_gemm.interface').grouped_gemm",
    "the function stays after the package": "import moe_xe.grouped_gemm.reference.moe_block, moe_xe; "
                                            "import moe_xe.grouped_gemm; assert callable(moe_xe.grouped_gemm)",
    "no Transformers needed": "import sys; import moe_xe.grouped_gemm.reference.moe_block; assert 'transformers' not in sys.modules",
}


# one process that has torch, and a fork of it, without moe_xe yet, for each form
RUNNER = """
import os, sys, torch
for form in sys.argv[1:]:
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        exec(form)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        print(form)
"""


@pytest.fixture(scope="module")
def failures():
    done = subprocess.run([sys.executable, "-c", RUNNER, *FORMS.values()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.few(4)
@pytest.mark.parametrize("form", FORMS)
def test_form(form, failures):
    failed, stderr = failures
    assert FORMS[form] not in failed, stderr
