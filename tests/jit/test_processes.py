import os
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import sys
import numpy as np
from moe_xe.jit import KernelSource, compile_kernel, stats
from moe_xe.jit.shipped_sources import sources_digest
from moe_xe.runtime import Queue

queue = Queue.create("cpu")
kernel = compile_kernel(queue, KernelSource("vector_add", "ppppiqf", sys.stdin.read()))
a = np.arange(4, dtype=np.float32)
out = np.zeros_like(a)
kernel.launch(queue, 4, 1, (None, a.ctypes.data, a.ctypes.data, out.ctypes.data, 4, 0, 1.0))
queue.wait()
print(sources_digest(), stats().compiled, stats().disk_hits, out.tolist())
"""


def start(directory, vector_add):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], env=os.environ | {"MOE_XE_CACHE_DIR": str(directory)},
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(vector_add.text)
    process.stdin.close()
    return process


def result(process):
    """Compiled, hits on disk, and the digest of the sources that the process saw."""
    output = process.stdout.read()
    assert process.wait() == 0
    digest, compiled, disk_hits, out = output.split(maxsplit=3)
    assert out.strip() == str((2 * np.arange(4.0)).tolist())
    return int(compiled), int(disk_hits), digest


def skip_if_edited(*digests):
    if len(set(digests)) > 1:
        pytest.skip("sycl_kernels was edited while the test ran, and the cache rightly compiled again")


def test_second_process_does_not_compile(queue, vector_add, tmp_path):
    *first, digest = result(start(tmp_path, vector_add))
    *second, digest_after = result(start(tmp_path, vector_add))
    assert first == [1, 0]
    skip_if_edited(digest, digest_after)
    assert second == [0, 1]


@pytest.mark.full
def test_processes_share_the_cache_at_the_same_time(queue, vector_add, tmp_path):
    together = [result(process) for process in [start(tmp_path, vector_add) for _ in range(2)]]
    *after, digest_after = result(start(tmp_path, vector_add))
    assert all(compiled + disk_hits == 1 for compiled, disk_hits, _ in together)
    skip_if_edited(digest_after, *(digest for *_, digest in together))
    assert after == [0, 1]
