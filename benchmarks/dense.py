"""A dense bf16 product of a matrix and one token, as fast as memory gives the matrix: compiled here from dense.cpp."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from rac_kernels.backends import native

FLAGS = {"avx2": "-mavx2 -mfma", "avx512bf16": "-mavx512f -mavx512bw -mavx512vl -mavx512bf16"}
FLAGS["amx"] = FLAGS["avx512bf16"]


Product = Callable[[Tensor, Tensor, Tensor], None]


def product() -> Product | None:
    """Compile dense.cpp: y [rows] fp32 = W [rows, columns] x, both bf16, of y, W and x; None where that does not go."""
    flags, build = FLAGS.get(native.info().get("isa", "")), native.info().get("build")
    if flags is None or build is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, object_, library = Path(__file__).with_name("dense.cpp"), f"{folder}/dense.o", f"{folder}/dense.so"
        compiler = shlex.split(build)[0]
        compile_ = [*shlex.split(build), *flags.split(), "-c", str(source), "-o", object_]
        # Not linked to an OpenMP library: it uses torch's, as the extension does.
        for command in (compile_, [compiler, "-shared", object_, "-o", library]):
            if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
                print(f"no dense product to compare with: {done.stderr}")
                return None
        function = ctypes.CDLL(library).dense_bf16
    function.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, ctypes.c_int]
    function.restype = None

    def run(y: Tensor, W: Tensor, x: Tensor) -> None:
        function(y.data_ptr(), W.data_ptr(), x.data_ptr(), *W.shape, native.threads())

    return run
