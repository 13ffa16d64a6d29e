import os
import subprocess
import sys

import numpy as np

SCRIPT = """
import sys
import numpy as np
from moe_xe.jit import KernelSource, compile_kernel, stats
from moe_xe.runtime import Queue

queue = Queue.create("cpu")
kernel = compile_kernel(queue, KernelSource("vector_add", "ppppiqf", sys.stdin.read()))
a = np.arange(4, dtype=np.float32)
out = np.zeros_like(a)
kernel.launch(queue, 4, 1, (None, a.ctypes.data, a.ctypes.data, out.ctypes.data, 4, 0, 1.0))
queue.wait()
print(stats().compiled, stats().disk_hits, out.tolist())
"""


def start(directory, vector_add):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], env=os.environ | {"MOE_XE_CACHE_DIR": str(directory)},
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(vector_add.text)
    process.stdin.close()
    return process


def result(process):
    output = process.stdout.read()
    assert process.wait() == 0
    compiled, disk_hits, out = output.split(maxsplit=2)
    assert out.strip() == str((2 * np.arange(4.0)).tolist())
    return int(compiled), int(disk_hits)


def test_second_process_does_not_compile(queue, vector_add, tmp_path):
    assert result(start(tmp_path, vector_add)) == (1, 0)
    assert result(start(tmp_path, vector_add)) == (0, 1)


def test_processes_share_the_cache_at_the_same_time(queue, vector_add, tmp_path):
    for process in [start(tmp_path, vector_add) for _ in range(3)]:
        assert sum(result(process)) == 1
    assert result(start(tmp_path, vector_add)) == (0, 1)
