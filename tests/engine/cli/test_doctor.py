"""The doctor says what there is, what is missing, what that costs and what to do, and looks at all of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
import torch

import rac_kernels
from rac_engine.cli import findings as doctor
from rac_engine.cli.findings import Finding, examine, render
from rac_engine.evaluation import judge as answers
from rac_engine.jobs import surroundings as found
from rac_engine.jobs.surroundings import code_sha256, surroundings
from rac_kernels.backends import cuda, native
from rac_kernels.backends import gpu as triton_kernels


def _by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_everything_that_decides_speed_is_looked_at():
    found = _by_name(examine())
    assert {"python", "processor", "memory", "disk", "torch", "native extension", "compiler", "triton", "nvcc"} <= set(
        found
    )
    assert any(name.startswith("GPU") for name in found)
    assert found["python"].status == "ok" and "torch 2" in found["python"].found


def test_a_missing_extension_says_what_it_costs_and_how_to_mend_it(monkeypatch):
    monkeypatch.setattr(native, "info", lambda: {"available": False, "why_missing": "no compiler when installed"})
    finding = _by_name(examine())["native extension"]
    assert finding.status == "note"
    assert "no compiler when installed" in finding.found
    assert "slower" in finding.costs and "apt install g++" in finding.mend


def test_two_openmp_runtimes_are_noted(monkeypatch):
    info = {**native.info(), "available": True, "isa": "avx2", "isas": ["avx2"], "build": "g++", "threads": 2}
    monkeypatch.setattr(native, "info", lambda: {**info, "openmp_runtime": ["/a/libgomp.so.1", "/b/libgomp.so.1"]})
    assert _by_name(examine())["OpenMP"].status == "note"


def test_a_missing_package_is_a_failure(monkeypatch):
    real = found.version_of
    monkeypatch.setattr(found, "version_of", lambda name: None if name == "pyarrow" else real(name))
    finding = _by_name(examine())["python"]
    assert finding.status == "fail" and "pyarrow" in finding.costs


def test_without_math_verify_answers_are_compared_otherwise_and_it_is_said(monkeypatch):
    real = found.version_of
    monkeypatch.setattr(found, "version_of", lambda name: None if name == "math-verify" else real(name))
    finding = _by_name(examine())["math-verify"]
    assert finding.status == "note" and "as text and numbers" in finding.costs
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with answers.Judge() as judge:
        assert judge.how == "text and numbers"
        assert not judge.same("x+1", "1+x")
        assert judge.same(r"\frac{1}{2}", "0.5")
        assert judge.same("0.5", "1/2")


def test_a_look_that_fails_is_a_finding_and_the_others_go_on(monkeypatch):
    def broken() -> list[Finding]:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "_machine", broken)
    found = _by_name(examine())
    assert "no such thing" in found["machine"].found
    assert "torch" in found


@pytest.mark.parametrize(
    ("status", "verdict"), [("ok", "Ready."), ("note", "Ready; could be better: GPU."), ("fail", "Not ready: GPU.")]
)
def test_the_page_ends_with_a_verdict(status, verdict):
    text = render([Finding("python", "ok", "3.11"), Finding("GPU", status, "none", "slow", "buy one")])
    assert text.endswith(verdict)
    assert "costs: slow" in text and "to do: buy one" in text


def test_the_code_is_told_by_its_digests() -> None:
    found = code_sha256()
    assert {"rac_engine", "rac_kernels"} <= found.keys()
    assert ("native" in found) == bool(list(Path(rac_kernels.__file__).parent.glob("_native*.so")))
    assert all(len(digest) == 64 for digest in found.values())
    told = surroundings("cpu")
    assert told["code.rac_engine"] == found["rac_engine"]
    assert told["versions.pyarrow"] == pyarrow.__version__


def test_whether_the_cuda_kernels_run_is_asked_of_each_gpu(monkeypatch):
    gpu = SimpleNamespace(name="Some GPU", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(triton_kernels, "_refusals", {})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "why_unusable", lambda device: "no code for it" if device.index else "")
    found = _by_name(doctor._gpus())
    assert found["GPU 1"].status == found["CUDA kernels on GPU 0"].status == "ok"
    assert found["CUDA kernels on GPU 1"].found == "not used: no code for it"
    assert "Triton" in found["CUDA kernels on GPU 1"].costs and found["CUDA kernels on GPU 1"].mend


@pytest.mark.parametrize(
    ("minor", "hip", "why"), [(5, None, "compute capability 7.5 is older than 8.0"), (0, "6.4.0", "Triton for ROCm")]
)
def test_a_gpu_without_kernels_is_noted(monkeypatch, minor, hip, why):
    gpu = SimpleNamespace(name="Some GPU", total_memory=8 << 30, major=7, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, minor))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton_kernels, "_refusals", {})
    found = _by_name(doctor._gpus())
    assert found.keys() == {"GPU 0", "kernels on GPU 0"}
    assert found["kernels on GPU 0"].status == "note" and why in found["kernels on GPU 0"].found
    assert "plain torch" in found["kernels on GPU 0"].costs
