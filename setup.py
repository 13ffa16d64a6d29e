"""Builds the extension with CMake; everything else is in pyproject.toml."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def sycl_prefix() -> Path:
    """The prefix of the wheel intel-sycl-rt, which pip's build isolation puts in its own place."""
    for file in importlib.metadata.files("intel-sycl-rt") or ():
        if file.as_posix().endswith("include/sycl/sycl.hpp"):
            return Path(file.locate()).resolve().parents[2]
    raise RuntimeError("the wheel intel-sycl-rt brings no SYCL headers: pip install 'intel-sycl-rt>=2026.0'")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        # An editable module lies outside the environment and needs its path. Under
        # build isolation that is not where the headers are: sys.prefix is.
        libdir = f"{sys.prefix}/lib" if self.editable_mode else ""
        self._run(
            ["cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
             f"-DPython_EXECUTABLE={sys.executable}",
             f"-DMOE_XE_SYCL_PREFIX={sycl_prefix()}",
             f"-DMOE_XE_EDITABLE_LIBDIR={libdir}"])
        self._run(["cmake", "--build", str(build_dir)])
        # Of an editable build setuptools takes only the module to the source folder; the program goes there directly.
        installs = [(destination, "runtime")]
        installs.append((ROOT / "moe_xe", "runtime") if self.editable_mode else (destination, "kernel_sources"))
        for prefix, component in installs:
            self._run(["cmake", "--install", str(build_dir), "--prefix", str(prefix), "--component", component])

    @staticmethod
    def _run(command: list[str]) -> None:
        subprocess.run(command, check=True)


setup(ext_modules=[Extension("moe_xe._runtime", sources=[])], cmdclass={"build_ext": CMakeBuild})
