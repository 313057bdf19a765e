"""The CUDA kernels in the extension: built, left out with a reason, loaded without a driver; what cuda.py takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rac_kernels.backends import cuda, native
from tests.cuda.host import ROOT
from tests.cuda.test_compiles import build_script

built = pytest.mark.skipif(not cuda.built(), reason=cuda.why_missing() or "built")


def test_off_and_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_cuda = build_script()["find_cuda"]
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_cuda(["g++"]).startswith(f"{nvcc} does not work")
    monkeypatch.setenv("RAC_CUDA", "0")
    assert find_cuda(["g++"]) == "turned off by RAC_CUDA=0"


@pytest.mark.skipif(isinstance(build_script()["find_cuda"](["g++"]), str), reason="needs nvcc")
def test_cuda_sources_that_do_not_compile_cost_only_themselves(tmp_path: Path) -> None:
    for file in ("setup.py", "pyproject.toml", "rac_engine/__init__.py", "kernels/rac_kernels/__init__.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, tmp_path / file)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "broken.cu").write_text("#error broken\n")
    (tmp_path / "csrc" / "bindings.cpp").write_text("#ifndef RAC_CUDA\nconst char* why = RAC_CUDA_MISSING;\n#endif\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"RAC_CUDA": "", "RAC_REQUIRE_NATIVE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "csrc/cuda is left out" in done.stderr and "#error broken" in done.stderr
    assert any((tmp_path / "kernels" / "rac_kernels").glob("_native*"))


@pytest.mark.skipif(not native.available(), reason="no native extension")
def test_info_says_how_or_why_not() -> None:
    info = native.info()
    assert bool(info["cuda"]) != bool(info["cuda_missing"])
    assert cuda.why_missing() == info["cuda_missing"]


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_driver_a_launch_is_refused() -> None:
    library = native.library()
    with pytest.raises(RuntimeError, match="CUDA: "):
        library.cuda_factor_corner(0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0)
    with pytest.raises(RuntimeError, match="CUDA: "):
        library.cuda_select(0, [1], [1], 0, 0, 0, 0)


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_built_is_not_usable() -> None:
    """Asked of CUDA itself, which finds no driver here, and kept."""
    device = torch.device("cuda:0")
    assert not cuda.usable(device) and "CUDA: " in cuda.why_unusable(device)
    assert cuda.why_unusable(torch.device("cpu")) == "cpu is no GPU"
    asked = torch.compile(lambda x: x + len(cuda.why_unusable(device)), backend="eager", fullgraph=True)
    assert asked(torch.zeros(())) == len(cuda.why_unusable(device))


@built
def test_arguments_that_do_not_fit() -> None:
    H, inverse, status = torch.eye(8), torch.empty(4, 4), torch.zeros(1, dtype=torch.int32)
    for message, arguments in {
        "square fp32": (H.double(), 0, 4, inverse, status),
        "contiguous rows": (H[:, ::2][:4], 0, 4, inverse, status),
        "corner 5:9": (H, 5, 9, inverse, status),
        "inverse must be": (H, 0, 3, inverse, status),
        "status must be": (H, 0, 4, inverse, status.long()),
        "on one GPU": (H, 0, 4, inverse, status),
    }.items():
        with pytest.raises(ValueError, match=message):
            cuda.factor_corner_(*arguments)
    for message, pulls in {
        "pulls must be at least": torch.empty(2, 3, 4),
        "pulls must be fp32": torch.empty(2, 4, 4, dtype=torch.half),
        "on one GPU": torch.empty(2, 4, 4),
    }.items():
        with pytest.raises(ValueError, match=message):
            cuda.factor_corner_(H, 0, 4, inverse, status, pulls)
    scores = torch.ones(10)
    for message, scored in {
        "scores must be": (scores, [8, 4], [1, 1]),
        "k .* must lie": (scores, [6, 4], [1, 5]),
        "must lie": (scores, [10], [1, 1]),
        "on one GPU": (scores, [10], [1]),
    }.items():
        with pytest.raises(ValueError, match=message):
            cuda.select_thresholds(*scored)
