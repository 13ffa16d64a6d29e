"""A dump folder of `ocloc disasm`: kernels, listings, symbols, relocations."""
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

PREFIX = "__sycl_kernel_"                              # what SYCL puts in front of a free function's name
NOT_A_KERNEL = "Intel_Symbol_Table_Void_Program"       # holds the functions that kernels call


class Symbol(NamedTuple):
    """section: "UNDEF" for a function that no module defines; value: offset in the section, bytes."""
    name: str
    section: str
    value: int


class Relocation(NamedTuple):
    """offset: of the 32-bit field to patch, bytes from the start of the section; type 2: low half, 3: high half."""
    offset: int
    type: int
    symbol: Symbol


@dataclass(frozen=True)
class Dump:
    """A dump folder; nothing is read before it is asked for."""
    folder: Path

    @cached_property
    def ze_info(self) -> dict[str, Any]:
        """The module's description by the compiler (.ze_info, YAML)."""
        return yaml.safe_load((self.folder / ".ze_info").read_text())

    @cached_property
    def _kernels(self) -> dict[str, dict[str, Any]]:
        return {k["name"]: k for k in self.ze_info["kernels"] if k["name"] != NOT_A_KERNEL}

    @property
    def kernels(self) -> list[str]:
        """The kernels' names as in the source."""
        return [name.removeprefix(PREFIX) for name in self._kernels]

    def kernel(self, name: str) -> dict[str, Any]:
        """The .ze_info record of a kernel, named as in the source or in the binary. Raises KeyError."""
        for candidate in (name, PREFIX + name):
            if candidate in self._kernels:
                return self._kernels[candidate]
        raise KeyError(f"no kernel {name} in {self.folder}; it has {self.kernels}")

    def listing(self, section: str) -> str:
        """The disassembly of a text section; a kernel's is ".text." and its name in the binary."""
        return (self.folder / f"{section}.asm").read_text()

    @cached_property
    def symbols(self) -> list[Symbol]:
        out = []
        for line in _table(self.folder / ".symtab"):
            fields = [x.strip() for x in line.split(",")]
            out.append(Symbol(",".join(fields[1:-5]), fields[-5], int(fields[-4])))      # a name may hold commas
        return out

    def relocations(self, section: str) -> list[Relocation]:
        rows = (map(int, line.split(",")) for line in _table(self.folder / f".rel{section}"))
        return [Relocation(offset, kind, self.symbols[index]) for offset, kind, index in rows]


def _table(path: Path) -> list[str]:
    """The lines below the heading; none where the module has no such section."""
    return path.read_text().splitlines()[1:] if path.exists() else []
