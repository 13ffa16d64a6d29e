"""The most memory that a program takes meanwhile, as the kernel sees it."""
import re
import threading
from contextlib import contextmanager
from pathlib import Path


def resident() -> int:
    """Bytes, without pages of files, which the kernel may drop at any time."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


@contextmanager
def printed_peak():
    """Prints the most that there is at any time within, beside what was there before."""
    before = most = resident()
    done = threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.001):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    print(max(most, resident()) - before)
