"""Builds the native extension ``rac_kernels._native`` with ninja; everything else is in pyproject.toml.

Every file of csrc/cpu is compiled once for each instruction set below, in a namespace of that name, and the extension
chooses at run time. The extension is optional: without a compiler the install succeeds and the torch references do the
work. ``RAC_REQUIRE_NATIVE=1`` makes a failed build an error; ``CXX`` names the compiler.

The files of csrc/cuda go in where an nvcc is found that can compile them. They bring CUDA's runtime along, so the
extension loads without a driver and beside any torch. ``RAC_CUDA=0`` leaves them out.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BASE_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512"]
BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
AMX = [*BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
ISAS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": BF16, "amx": AMX}
# What a file needs beyond its instruction set, which bindings.cpp asks the processor for before it calls that version.
EXPANDING = {isa: ["-mavx512vbmi", "-mavx512vbmi2"] for isa in ("avx512bf16", "amx")}
FURTHER = {"packed": EXPANDING, "packed_tiles": EXPANDING}
# Not for speed alone: without -ftz the hardware's reciprocal roots are wrapped in code for denormal numbers.
NVCC_FLAGS = ["-std=c++17", "-O3", "-ftz=true", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
CAPABILITIES = (80, 90, 100)  # with code of their own; later devices compile the PTX of the last
X86 = platform.machine().lower() in ("x86_64", "amd64")


class BuildFailed(Exception):
    """Why there is no extension, in words for whoever installs."""


def find_compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, else the first of g++, c++ and clang++ that is there."""
    named = os.environ.get("CXX")
    for command in [shlex.split(named)] if named else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildFailed(f"no C++ compiler ({named or 'g++, c++, clang++'}); install one (apt install g++)")


def compiles(compiler: list[str], flags: list[str], source: str = "int rac;") -> bool:
    """Whether the compiler takes these flags."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.cpp"
        file.write_text(source)
        command = [*compiler, *flags, "-Werror", "-c", str(file), "-o", str(file.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def openmp_flags(compiler: list[str]) -> list[str]:
    """-fopenmp for GCC: its GOMP_* calls stay undefined in the extension and find the libgomp inside torch's wheel.

    Linking libgomp would start a second thread pool beside torch's. Clang calls another runtime, which torch does not
    bring, so there the extension runs on one thread.
    """
    gcc = compiles(compiler, [], "#ifdef __clang__\n#error\n#endif\n")
    return ["-fopenmp"] if gcc and sys.platform == "linux" and compiles(compiler, ["-fopenmp"]) else []


class Cuda(NamedTuple):
    """How to compile csrc/cuda."""

    command: list[str]
    libraries: list[str]  # what to link
    described: str


def find_cuda(compiler: list[str]) -> Cuda | str:
    """The nvcc of $CUDA_HOME, $PATH or /usr/local (the newest), or why there is none to use."""
    if os.environ.get("RAC_CUDA") == "0":
        return "turned off by RAC_CUDA=0"
    installed = sorted(map(str, Path("/usr/local").glob("cuda*/bin")), reverse=True)
    home = os.environ.get("CUDA_HOME")
    folders = [*([f"{home}/bin"] if home else []), os.environ.get("PATH", ""), *installed]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if not nvcc or sys.platform != "linux":
        return "no nvcc in $CUDA_HOME/bin, $PATH or /usr/local/cuda*/bin"

    def ask(*arguments: str) -> str:
        return subprocess.run([nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    known = ask("--list-gpu-arch").split()
    capabilities = [number for number in CAPABILITIES if f"compute_{number}" in known]
    version = re.search(r"release.*", ask("--version"))
    paths = re.search(r"LIBRARIES=(.*)", ask("--dryrun", "-E", "-x", "cu", os.devnull))
    if not (capabilities and version and paths):
        return f"{nvcc} does not work, or serves none of the compute capabilities {CAPABILITIES}"
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in capabilities]
    codes.append(f"-gencode=arch=compute_{capabilities[-1]},code=compute_{capabilities[-1]}")
    return Cuda(
        [nvcc, "-ccbin", compiler[-1], f"--threads={len(codes)}", *NVCC_FLAGS, *codes],
        # Its symbols hidden: torch brings a CUDA runtime as well, and neither may run the other's functions.
        [*shlex.split(paths[1]), "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"],
        f"nvcc {version[0]}: {' '.join([*NVCC_FLAGS, *codes])}",
    )


def write_ninja(folder: Path, target: Path, cuda: Cuda | str) -> None:
    """Write folder/build.ninja, which makes `target` from csrc."""
    compiler = find_compiler()
    common = [*BASE_FLAGS, *openmp_flags(compiler)]
    isas = {name: flags for name, flags in ISAS.items() if not flags or (X86 and compiles(compiler, flags))}
    includes = [
        f"-isystem{sysconfig.get_paths()['include']}",
        f"-isystem{pybind11.get_include()}",
        f"-I{ROOT / 'csrc'}",
    ]
    built = [f"-DRAC_HAVE_{name.upper()}" for name in isas]
    openmp = ["-DRAC_OPENMP"] if "-fopenmp" in common else []
    described = f"{' '.join(compiler)} {' '.join(common)}"
    libraries = cuda.libraries if isinstance(cuda, Cuda) else []
    about_cuda = [f'-DRAC_CUDA="{cuda.described}"'] if isinstance(cuda, Cuda) else [f'-DRAC_CUDA_MISSING="{cuda}"']
    link = ["-shared", "-Wl,--gc-sections"] if sys.platform == "linux" else ["-bundle", "-undefined", "dynamic_lookup"]

    def path(file: Path) -> str:
        return str(file).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def words(parts: list[str]) -> str:
        return " ".join(shlex.quote(part) for part in parts).replace("$", "$$")

    lines = [
        "ninja_required_version = 1.5",
        f"rule compile\n  command = {words([*compiler, *common])} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = $name",
        f"rule link\n  command = {words([*compiler, *link])} $in {words(libraries)} -o $out\n  description = link",
    ]
    objects = []

    def compile_(source: Path, name: str, flags: list[str], rule: str = "compile") -> None:
        out = folder / f"{name}.o"
        objects.append(path(out))
        lines.append(f"build {objects[-1]}: {rule} {path(source)}\n  flags = {words(flags)}\n  name = {name}")

    compile_(
        ROOT / "csrc/bindings.cpp", "bindings", [*includes, *built, *openmp, *about_cuda, f'-DRAC_BUILD="{described}"']
    )
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        for isa, flags in isas.items():
            own = [*flags, *FURTHER.get(source.stem, {}).get(isa, []), f"-DRAC_ISA={isa}", f"-I{ROOT / 'csrc'}"]
            compile_(source, f"{source.stem}.{isa}", ["-fno-exceptions", *own])
    if isinstance(cuda, Cuda):
        lines.append(
            f"rule cuda\n  command = {words(cuda.command)} $flags -MMD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = $name"
        )
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            compile_(source, f"cuda_{source.stem}", [f"-I{ROOT / 'csrc'}"], "cuda")
    lines += [f"build {path(target)}: link {' '.join(objects)}", f"default {path(target)}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))


class NinjaBuild(build_ext):
    """setuptools' build_ext with the compiling handed to ninja."""

    def run_ninja(self, folder: Path, built: Path, cuda: Cuda | str) -> None:
        write_ninja(folder, built, cuda)
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), *(["-v"] if self.verbose > 1 else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise BuildFailed(f"compiling failed:\n{done.stdout}")
        print(done.stdout)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / "native" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        built = folder / target.name
        try:
            cuda = find_cuda(find_compiler())
            try:
                self.run_ninja(folder, built, cuda)
            except BuildFailed as why:
                if isinstance(cuda, str):
                    raise
                self.warn(f"csrc/cuda is left out: {why}")
                self.run_ninja(folder, built, "nvcc failed to compile csrc/cuda; reinstall to see why")
            shutil.copy2(built, target)
        except BuildFailed as why:
            if os.environ.get("RAC_REQUIRE_NATIVE"):
                raise
            for stale in (target, ROOT / "kernels" / "rac_kernels" / target.name):  # may not fit the rest any more
                stale.unlink(missing_ok=True)
            self.warn(f"rac_kernels._native is left out, the torch references will be used (slower): {why}")


setup(ext_modules=[Extension("rac_kernels._native", sources=[], optional=True)], cmdclass={"build_ext": NinjaBuild})
