"""The first use of moe_xe in a process, by many threads at once."""
import subprocess
import sys

SCRIPT = """
import collections, sys, threading, time, warnings
import torch
import moe_xe
from moe_xe import runtime
from moe_xe.jit import compiler, stats
from moe_xe.tuning import tuner

warnings.filterwarnings("ignore")
made = collections.Counter()

def counted(kind):
    make = kind.__init__
    def init(self, *arguments, **options):
        made[kind.__name__] += 1
        time.sleep(0.1)     # all the others come meanwhile
        make(self, *arguments, **options)
    kind.__init__ = init

for kind in (compiler.Compiler, tuner.Tuner):
    counted(kind)

class Queue(runtime.Queue):
    @staticmethod
    def create(*arguments):
        made["Queue"] += 1
        time.sleep(0.1)
        return runtime.Queue.create(*arguments)

import moe_xe.device
moe_xe.device.Queue = Queue
together, failures = threading.Barrier(8), []

def work():
    try:
        a, w, counts = torch.ones(3, 5), torch.ones(2, 4, 5), torch.tensor([1, 2], dtype=torch.int32)
        together.wait()
        tuner.default_tuner()
        assert (moe_xe.grouped_gemm(a, w, counts) == 5).all()
    except BaseException as error:
        failures.append(error)

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sorted(made.items()), stats().compiled + stats().disk_hits, stats().memory_hits, failures)
assert 'torch._dynamo' not in sys.modules     # which takes seconds to load
"""


def test_everything_is_made_once():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=200)
    assert done.stdout == "[('Compiler', 1), ('Queue', 1), ('Tuner', 1)] 1 7 []\n", done.stdout + done.stderr
