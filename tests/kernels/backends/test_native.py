"""The extension: one OpenMP runtime, torch's thread count, instruction sets kept apart, and life without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest
import torch

from rac_kernels import hessian_accumulate_
from rac_kernels.backends import native

ROOT = Path(__file__).parents[3]
OBJECTS = sorted((ROOT / "build" / "native").glob("*/*.*.o"))
built = pytest.mark.skipif(not native.available(), reason=f"no native extension: {native.info()['why_missing']}")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with these variables on top of the environment."""
    command = [
        sys.executable,
        "-c",
        f"import torch, json, os\nimport rac_kernels as r\nfrom rac_kernels import native\n{code}",
    ]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


@built
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_torchs_with_as_many_threads_as_torch_says() -> None:
    done = python(
        "def run():\n"
        "    r.hessian_accumulate_(torch.zeros(600, 600), torch.ones(300, 600))\n"
        "    return len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(1)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "single = run()\n"
        "torch.set_num_threads(3)\n"
        "triple = run()\n"
        "x = torch.randn(600, 600); x @ x\n"
        "print(json.dumps([before, single, triple, native.info(), os.path.dirname(torch.__file__)]))",
        RAC_NATIVE_ISA="baseline",
    )
    before, single, triple, info, home = json.loads(done.stdout)
    assert len(info["openmp_runtime"]) == 1
    packages = Path(home).resolve().parent  # torch/lib; torch.libs in CUDA wheels
    assert Path(info["openmp_runtime"][0]).is_relative_to(packages)
    assert single == before and triple == before + 2 * info["openmp"]
    assert info["isa"] == "baseline"


@built
def test_info() -> None:
    info = native.info()
    assert info["isa"] in info["isas"] and info["isas"][0] == "baseline"
    assert info["threads"] == torch.get_num_threads()
    assert "-O3" in info["build"] and not info["why_missing"]


@built
def test_an_instruction_set_by_name() -> None:
    before = native.info()["isa"]
    with native.use_isa("baseline"):
        assert native.info()["isa"] == "baseline"
    assert native.info()["isa"] == before
    with pytest.raises(ValueError, match="no instruction set is called mmx"), native.use_isa("mmx"):
        pass
    assert "RAC_NATIVE_ISA=mmx" in python("", RAC_NATIVE_ISA="mmx").stderr


def test_without_the_extension() -> None:
    done = python(
        "print(native.available(), native.info()['why_missing'])\n"
        "print(r.hessian_accumulate_(torch.zeros(2, 2), torch.ones(3, 2))[0, 1].item())\n"
        "r.hessian_accumulate_(torch.zeros(2, 2), torch.ones(3, 2), backend='native')",
        RAC_NATIVE="0",
    )
    assert done.stdout.split("\n")[:2] == ["False turned off by RAC_NATIVE=0", "3.0"]
    assert "NativeMissing: the native extension is missing: turned off" in done.stderr


def test_a_backend_named_is_never_replaced() -> None:
    H, X = torch.zeros(2, 2, device="meta"), torch.zeros(3, 2, device="meta")
    assert hessian_accumulate_(H, X) is H
    with pytest.raises(ValueError, match="'cuda': this operation has no CUDA kernel"):
        hessian_accumulate_(H, X, backend="cuda")
    with pytest.raises((ValueError, native.NativeMissing), match=r"CPU|missing"):
        hessian_accumulate_(H, X, backend="native")


@pytest.mark.skipif(not OBJECTS or not shutil.which("nm"), reason="needs the build folder and nm")
def test_instruction_sets_share_no_code() -> None:
    """An inline function of the standard library compiled for AVX-512 could become the one copy that all run."""
    for file in OBJECTS:
        symbols = subprocess.run(["nm", "-C", file], capture_output=True, text=True, check=True).stdout.splitlines()
        defined = [line.split(maxsplit=2) for line in symbols if len(line.split(maxsplit=2)) == 3]
        isa = file.name.split(".")[1]
        for _, kind, name in defined:
            assert kind not in "WwVvu", f"{file.name}: {name} may be merged with another instruction set's"
            assert kind not in "TDBR" or name.startswith(f"rac::{isa}::"), f"{file.name}: {name} is visible to all"


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_the_bindings_compile_where_no_instruction_set_but_the_first_was_built() -> None:
    """As on processors that are not x86, and with compilers that know fewer of their instruction sets."""
    includes = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    told = ["-DRAC_HAVE_BASELINE", '-DRAC_BUILD="none"', '-DRAC_CUDA_MISSING="none"']
    command = ["g++", "-std=c++17", "-fsyntax-only", *includes, *told, str(ROOT / "csrc/bindings.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup.py needs, elsewhere."""
    for file in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "rac_engine/__init__.py",
        "kernels/rac_kernels/__init__.py",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, tmp_path / file)
    return tmp_path


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_installs_without_a_compiler(checkout: Path) -> None:
    stale = (
        checkout / "kernels" / "rac_kernels" / Path(str(native.library().__file__)).name if native.available() else None
    )
    if stale:
        stale.write_text("an extension of an earlier version")
    done = build(checkout, CXX="no-such-compiler", RAC_REQUIRE_NATIVE="")
    assert done.returncode == 0
    assert "no C++ compiler (no-such-compiler" in done.stderr
    assert not stale or not stale.exists()


def test_a_required_extension_is_required(checkout: Path) -> None:
    assert build(checkout, CXX="no-such-compiler", RAC_REQUIRE_NATIVE="1").returncode != 0
