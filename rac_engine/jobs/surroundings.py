"""Versions, sources and the machine: with the input they decide the last bits of a result."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rac_engine.base.errors import BadInput


def versions() -> dict[str, str]:
    """Installed versions of what decides the bytes of a result."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "pyarrow"):
        version = version_of(name)
        if version:
            found[name] = version
    return found


@functools.cache
def code_sha256() -> dict[str, str]:
    """SHA-256 of the engine's and the kernels' own sources, and of the native extension where it was built.

    Versions alone do not tell one state of a source tree from the next, nor one build of the extension from another.
    """
    import rac_engine
    import rac_kernels

    found = {}
    for module in (rac_engine, rac_kernels):
        home, digest = Path(module.__file__ or "").parent, hashlib.sha256()
        for file in sorted(file for file in home.rglob("*") if file.suffix in (".py", ".j2")):
            data = file.read_bytes()
            digest.update(f"{file.relative_to(home)} {len(data)}\n".encode() + data)
        found[module.__name__] = digest.hexdigest()
        for file in sorted(home.glob("_native*.so")):
            found[file.name.partition(".")[0].lstrip("_")] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def machine(device: str) -> dict[str, Any]:
    """The machine, as far as it decides the last bits of a result: processor, threads, device and kernels."""
    import torch

    from rac_kernels.backends import native

    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "kernels": f"native {native.info()['isa']}" if native.available() else "torch",
    }


def usable_device(name: str) -> str:
    """The device that a name stands for: "auto" is a GPU if there is one. `BadInput` for one that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"device {name}: {reason}; `rac doctor` shows what there is") from None
    return name


def surroundings(device: str) -> dict[str, Any]:
    """Versions, sources and the machine by dotted names: with the input they decide the last bits of a result."""
    import rac_engine

    parts = {
        "versions": {**versions(), "rac_engine": rac_engine.__version__},
        "code": code_sha256(),
        "machine": machine(device),
    }
    return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}


def version_of(name: str) -> str | None:
    """The installed version of what is imported as `name`; None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
