"""Work in a process of its own: a driver that crashes or hangs must not take the report with it."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

_MOST_LINES = 12     # of what a program says on stderr


def run(*arguments: str, seconds: float, **variables: str) -> dict:
    """The JSON object that `python -m moe_xe.doctor.probe` prints for these arguments; variables: added to the environment.

    In a failure's place {"error": text}. "said": the last lines of its stderr, where it wrote any.
    """
    # a session, so that what the program has started ends with it, and the pipes with that
    process = subprocess.Popen([sys.executable, "-m", "moe_xe.doctor.probe", *arguments], stdin=subprocess.DEVNULL, text=True, errors="replace",
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | variables, start_new_session=True)
    try:
        output, said = process.communicate(timeout=seconds)
        found = _result(process.returncode, output)
    except subprocess.TimeoutExpired:
        _kill(process)
        said = process.communicate()[1]
        found = {"error": f"no answer in {seconds:g} s, killed"}
    except BaseException:
        _kill(process)
        raise
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return found | ({"said": list(dict.fromkeys(lines))[-_MOST_LINES:]} if lines else {})


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _result(status: int, output: str) -> dict:
    if status < 0:
        return {"error": f"killed by signal {-status}, {signal.strsignal(-status)}"}
    if status:
        return {"error": f"exit status {status}"}
    try:
        return json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"it printed no result: {output[-200:]!r}"}
