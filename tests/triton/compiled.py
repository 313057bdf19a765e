"""Kernels compiled for GPUs that are not here, and what became of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """Machine code for one capability."""

    registers: int
    """a thread"""
    stack: int
    """bytes a thread, which is where spilled registers go"""
    shared: int
    """bytes a program"""
    ptx: str

    def tensor_core_instructions(self) -> int:
        """Matrix products on tensor cores, of whatever generation."""
        return len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", self.ptx))


def compile_for(
    capability: int,
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, object],
    aligned: tuple[str, ...] = (),
    **options: object,
) -> Compiled:
    """Compile a ``triton.jit`` function as a launch would, without a device.

    `arguments`: Triton's type of each that is passed at run time ("*fp32", "i32"); `constants`: the others; `aligned`:
    arguments known to be multiples of 16.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else arguments[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Compiled(**_usage(found.asm["cubin"]), shared=found.metadata.shared, ptx=found.asm["ptx"])


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()  # type: ignore[union-attr]
    return {"registers": int(registers), "stack": int(stack)}
