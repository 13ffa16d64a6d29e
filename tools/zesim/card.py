"""The library that is the card, and the environment in which SYCL finds it."""
from __future__ import annotations

import os
from pathlib import Path

from moe_xe.isa import ocloc
from moe_xe.private_folder import open_private
from xesim import cxx
from xesim.native import CORE
from xesim.native import HEADERS as CORE_HEADERS
from xesim.native import SOURCES as CORE_SOURCES

from . import generate_ddi

HERE = Path(__file__).resolve().parent
INCLUDE_VARIABLE = "LEVEL_ZERO_INCLUDE"     # the folder that has level_zero/ze_api.h, of version 1.17 or newer
LIBRARY = "libze_loader.so.1"               # the name under which the SYCL runtime looks for a loader


def missing_tools() -> str:
    """What the card lacks on this machine, and how to get it; "" if nothing."""
    if reason := ocloc.missing():
        return reason
    return "" if (_include() / "level_zero/ze_ddi.h").exists() else "Level Zero's headers were not found: run tools/install-ocloc"


def library() -> Path:
    """The simulated driver, which is its own loader, built if need be (a minute)."""
    include, map_ = _include(), HERE / "exports.map"
    headers = sorted((include / "level_zero").rglob("*.h"))
    return cxx.build(
        LIBRARY, [*sorted((HERE / "src").glob("*.cpp")), *CORE_SOURCES],
        [*sorted((HERE / "src").glob("*.h")), *CORE_HEADERS, *headers, Path(generate_ddi.__file__), map_],
        ["-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wno-missing-field-initializers", f"-I{HERE / 'src'}", f"-I{CORE}",
         "-isystem", str(include), "-isystem", str(include / "level_zero")],
        [f"-Wl,--version-script={map_}", f"-Wl,-soname,{LIBRARY}", "-Wl,--no-undefined", "-pthread"],
        lambda folder: generate_ddi.write(include, folder / "ddi_entries.inc"))


def environment(system_memory: bool = False) -> dict[str, str]:
    """The variables that put the card before a process which has not used SYCL yet.

    system_memory: kernels may use all memory of the process, as on a card with shared system USM.
    Raises FileNotFoundError where a tool is missing, subprocess.CalledProcessError where g++ fails.
    """
    if reason := missing_tools():
        raise FileNotFoundError(reason)
    modules = cxx.cache_folder() / "modules"
    os.close(open_private(modules, create=True))        # what lies there is run
    variables = {"ZEL_LIBRARY_PATH": str(library().parent), "ZESIM_CACHE_DIR": str(modules), "MOE_XE_OCLOC": _ocloc()}
    return variables | ({"ZESIM_SYSTEM_MEMORY": "1"} if system_memory else {})


def _include() -> Path:
    return Path(os.environ.get(INCLUDE_VARIABLE) or ocloc.private_root() / "usr/include")


def _ocloc() -> str:
    """What moe_xe takes, as the driver wants it: an executable, or the folder of a private root."""
    command = ocloc.find()
    return command[0] if len(command) == 1 else os.environ.get(ocloc.OVERRIDE) or str(ocloc.private_root())

