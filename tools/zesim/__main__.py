"""run COMMAND...: runs it where the simulated card is level_zero:gpu."""
import os
import sys

from .card import environment

if len(sys.argv) < 2:
    sys.exit("usage: tools/zesim/run COMMAND...\nRuns it with a simulated Arc B580 as level_zero:gpu (docs/simulated-gpu.md).")
try:
    os.environ.update(environment(system_memory=os.environ.get("ZESIM_SYSTEM_MEMORY", "0") != "0"))
    os.execvp(sys.argv[1], sys.argv[1:])
except FileNotFoundError as error:
    sys.exit(f"zesim: {error}")
