"""Kernels compiled for GPUs that are not here, and what became of them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rac_kernels.ops import hessian

#: Those that every test compiles for; with RAC_ALL_GPUS=1 in the environment 120 as well, which some always do.
CAPABILITIES = (80, 90, 100, 120) if os.environ.get("RAC_ALL_GPUS") else (80, 90, 100)
#: Bytes that a program may have; for 80 what 86 and 89 have.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
REGISTERS = 65536  # of a multiprocessor
#: The instruction by which each capability multiplies tiles of at least 64 rows; all have mma.sync for smaller ones.
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
# Of what sums over tokens: dtype, weighted, the result's row stride: 16 stands for its multiples, 1 for one column, 7
# for all others, and then results and weights begin anywhere.
LAUNCHES = [(dtype, weighted, 16) for dtype in TYPES for weighted in (False, True)]
LAUNCHES += [(torch.bfloat16, False, 1), (torch.bfloat16, False, 7), (torch.float32, True, 7)]
#: What is compiled for whom: (capability, launch).
SUMS = [(capability, launch) for capability in CAPABILITIES for launch in LAUNCHES]
SUMS += [] if 120 in CAPABILITIES else [(120, LAUNCHES[0])]
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
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)
    ttgir: str = field(repr=False)

    def conversions(self, shape: tuple[int, int]) -> int:
        """How often a tensor of that shape in fp32, as sums are, is given another layout within a loop."""
        depth, found, wanted = 0, 0, f"tensor<{shape[0]}x{shape[1]}xf32"
        for line in self.ttgir.splitlines():
            text = line.strip()
            if depth:
                # Every region within the loop counts, so that the loop's own end is known.
                found += "ttg.convert_layout" in text and f": {wanted}" in text
                depth += text.partition(" loc(")[0].endswith("{") - text.startswith("}")
            elif "scf.for" in text or "scf.while" in text:
                depth = 1
        return found

    def main_loop(self) -> list[str]:
        """The machine instructions of the longest loop, without predicates and operands."""
        found: list[tuple[int, str]] = []
        for line in _cuobjdump("-sass", self.cubin).splitlines():
            if match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?);", line):
                found.append((int(match[1], 16), match[2]))
        loops: list[list[str]] = [[]]
        for end, instruction in found:
            if (match := re.match(r"BRA.* 0x([0-9a-f]+)", instruction)) and int(match[1], 16) < end:
                loops.append([text.split()[0] for at, text in found if int(match[1], 16) <= at <= end])
        return max(loops, key=len)

    def tensor_cores(self) -> str:
        """The instruction that multiplies on tensor cores; "" for none, "a and b" where there are two kinds."""
        return " and ".join(sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", self.ptx))))

    def usage(self) -> str:
        """For a message."""
        return f"{self.registers} registers, {self.stack} bytes spilled, {self.shared} bytes shared"

    def fits(self, threads: int, programs: int, capability: int) -> bool:
        """Whether so many programs of so many threads share a multiprocessor, without a register spilled."""
        registers = -(-self.registers // 8) * 8  # as they are given out
        shared = self.shared * programs <= SHARED[capability]
        return not self.stack and shared and registers * threads * programs <= REGISTERS


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
    return Compiled(
        **_usage(found.asm["cubin"]),
        shared=found.metadata.shared,
        ptx=found.asm["ptx"],
        cubin=found.asm["cubin"],
        ttgir=found.asm["ttgir"],
    )


def copies(loop: list[str]) -> list[int]:
    """Bytes that a thread copies by each cp.async of some machine instructions."""
    widths = (re.search(r"^LDGSTS.*?(?:\.(64|128))?$", name) for name in loop)
    return [int(width[1] or 32) // 8 for width in widths if width]


def check_sums(
    capability: int,
    kernel: Any,
    group: int,
    launch: tuple[torch.dtype, bool, int],
    stride: str,
    kinds: dict[str, str],
    aligned: tuple[str, ...],
) -> None:
    """A kernel that sums over tokens, in the configuration that a launch of LAUNCHES chooses: no spills, its programs
    fit the multiprocessor, and the tensor cores of the capability at work. `stride` names the result's row stride."""
    dtype, weighted, value = launch
    chosen = hessian.config(dtype, weighted, capability)
    constants: dict[str, object] = {"WEIGHTED": weighted, "BLOCK": chosen.block, "STEP": chosen.step}
    constants |= {"RUN": chosen.run, "GROUP": group} | ({stride: 1} if value == 1 else {})
    multiples = {*aligned, "weights", "partial", *([stride] if value == 16 else [])}
    if value == 7:
        multiples -= {"weights", stride[0].upper()}
    found = compile_for(
        capability,
        kernel,
        kinds | {"weights": "*fp32", "partial": "*fp32"},
        constants,
        tuple(multiples),
        num_warps=chosen.warps,
        num_stages=chosen.stages,
        enable_fp_fusion=True,
    )
    assert found.fits(chosen.warps * 32, chosen.resident, capability), found.usage()
    assert found.tensor_cores() == TENSOR_CORES[capability]
    assert not found.conversions((chosen.block, chosen.block))
    if dtype != torch.float32 and not weighted:
        assert "cp.async.cg.shared.global" in found.ptx  # whole vectors, straight into shared memory
        assert "tf32" not in found.ptx
        assert set(copies(found.main_loop())) == {16}
    else:
        assert "tf32" in found.ptx


def check_parts(capability: int, kernel: Any, constants: dict[str, object], result: str, kinds: dict[str, str]) -> None:
    """The kernel that adds the parts of `result`'s tiles: no spills, eight programs on a multiprocessor."""
    found = compile_for(
        capability,
        kernel,
        kinds | {result: "*fp32", "partial": "*fp32"},
        constants,
        (result, f"{result.lower()}_stride", "partial"),
        num_warps=4,
        enable_fp_fusion=True,
    )
    assert found.fits(128, 8, capability), found.usage()  # bound by memory


def _usage(cubin: bytes) -> dict[str, int]:
    said = _cuobjdump("-res-usage", cubin)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()  # type: ignore[union-attr]
    return {"registers": int(registers), "stack": int(stack)}


def _cuobjdump(what: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(_CUOBJDUMP), what, file.name], capture_output=True, text=True, check=True).stdout
