"""A program: loads a quantised checkpoint and prints the most anonymous memory that it took at any time, beside what was there before, in bytes."""
import re
import sys
import threading
from pathlib import Path

import torch

from moe_xe.integrations.transformers import load_quantized


def resident() -> int:
    """Without pages of files, which the kernel may drop at any time."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


if __name__ == "__main__":
    tiny, folder = sys.argv[1:]
    load_quantized(tiny, dtype=torch.bfloat16)      # imports what loading needs
    before = most = resident()
    done = threading.Event()

    def watch():
        global most
        while not done.wait(0.001):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_quantized(folder, dtype=torch.bfloat16)
    done.set()
    watcher.join()
    print(max(most, resident()) - before)
