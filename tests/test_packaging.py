"""The way of a stranger: sdist → wheel → an environment of its own, in which the command and the kernels are there.

Nothing is fetched: the build takes setuptools, pybind11 and ninja from the running environment, and the new environment
sees the running one's packages behind its own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rac_engine import __version__
from tests.cuda.test_compiles import build_script

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".git", ".venv", "build", "demo-out", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints, run without this process's import path."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def sources() -> list[Path]:
    """All files of the project but what is built, fetched or printed by it; relative to its root."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if not f.startswith(LEFT_OUT) and not f.endswith(".egg-info")]
        found += [(Path(folder) / file).relative_to(ROOT) for file in files if not file.endswith(".so")]
    return found


@dataclass(frozen=True)
class Packages:
    """The sdist, the wheel made of it, and the environment into which that was installed."""

    sdist: Path
    wheel: Path
    bin: Path


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    try:
        compiler = build_script()["find_compiler"]()
    except Exception as why:
        pytest.skip(str(why))
    work = tmp_path_factory.mktemp("packages")
    tree = work / "tree"
    for file in sources():
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, tree / file)
    run(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(work)!r})", cwd=tree)
    (sdist,) = work.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):  # not in Python 3.11.3 and before, as Debian 12 has it
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(work / "unpacked")
    # What is compiled is of interest here, not how well: without the optimizer it takes a third of the time.
    quick = work / "compiler"
    quick.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@" -O0\n')
    quick.chmod(0o755)
    (unpacked,) = (work / "unpacked").iterdir()
    pip = (sys.executable, "-m", "pip")
    wheel = (*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", work, unpacked)
    run(*wheel, cwd=work, CXX=str(quick), RAC_CUDA="0", RAC_REQUIRE_NATIVE="1")
    (made,) = work.glob("*.whl")
    home = work / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=work)
    python = home / "bin" / "python"
    run(*pip, "--python", python, "install", "--quiet", "--no-deps", made, cwd=work)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=work).strip())
    behind = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "running.pth").write_text("\n".join(behind) + "\n")
    return Packages(sdist, made, home / "bin")


def test_an_sdist_holds_what_is_compiled(packages: Packages) -> None:
    with tarfile.open(packages.sdist) as archive:
        held = {str(Path(*Path(name).parts[1:])) for name in archive.getnames()}
    here = {str(file) for file in sources()}
    needed = {file for file in here if file.startswith(("csrc/", "rac_engine/", "kernels/"))}
    needed |= {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "setup.py", "pyproject.toml"}
    needed |= {file for file in here if file.startswith("docs/")} | {"examples/demo.yaml"}
    missing = needed - held
    assert not missing
    assert not {file for file in held if file.endswith((".so", ".safetensors"))}
    assert packages.sdist.stat().st_size < 4 << 20


def test_a_wheel_holds_the_extension_and_the_templates(packages: Packages) -> None:
    with zipfile.ZipFile(packages.wheel) as archive:
        held = set(archive.namelist())
    here = {str(file) for file in sources()}
    packaged = {file for file in here if file.startswith("rac_engine/")}
    packaged |= {file.removeprefix("kernels/") for file in here if file.startswith("kernels/")}
    assert {"rac_engine/report/templates/report.html.j2", "rac_engine/py.typed", "rac_kernels/py.typed"} <= packaged
    missing = packaged - held
    assert not missing
    assert any(file.startswith("rac_kernels/_native") and file.endswith(".so") for file in held)
    assert not {file.split("/")[0] for file in held if ".dist-info/" not in file} - {"rac_engine", "rac_kernels"}


def test_the_metadata(packages: Packages) -> None:
    with zipfile.ZipFile(packages.wheel) as archive:
        text = archive.read(f"rac_engine-{__version__}.dist-info/METADATA").decode().splitlines()
        license_text = archive.read(f"rac_engine-{__version__}.dist-info/licenses/LICENSE").decode()
    assert "License-Expression: Apache-2.0" in text and "Author: RAC Engine contributors" in text
    assert f"Version: {__version__}" in text and "Requires-Python: >=3.11" in text
    assert "Classifier: Operating System :: POSIX :: Linux" in text
    assert "Apache License" in license_text and "END OF TERMS AND CONDITIONS" in license_text
    known: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for needed in known["dependencies"]:
        assert any(line.startswith("Requires-Dist:") and needed.split(">")[0] in line for line in text), needed


def test_the_doctor_finds_the_native_kernels(packages: Packages, tmp_path: Path) -> None:
    findings = {each["what"]: each for each in json.loads(run(packages.bin / "rac", "doctor", "--json", cwd=tmp_path))}
    native = findings["native extension"]
    assert native["status"] == "ok" and "built by" in native["found"], native
    assert findings["python"]["status"] == "ok"


def test_command_and_imports_come_from_the_new_environment(packages: Packages, tmp_path: Path) -> None:
    assert run(packages.bin / "rac", "--version", cwd=tmp_path).strip() == f"rac {__version__}"
    code = "import rac_engine, rac_kernels; print(rac_engine.__file__); print(rac_kernels.__file__)"
    for file in run(packages.bin / "python", "-c", code, cwd=tmp_path).split():
        assert Path(file).is_relative_to(packages.bin.parent), file


def test_an_installed_command_prunes(packages: Packages, checkpoint: Any, tmp_path: Path) -> None:
    """Card and report are rendered from templates, which a wheel can lack."""
    run(packages.bin / "rac", "prune", checkpoint(), "OUT", "--method", "magnitude", cwd=tmp_path)
    assert "magnitude" in (tmp_path / "OUT" / "README.md").read_text()
    assert "<svg" in (tmp_path / "OUT" / "rac" / "report.html").read_text()
