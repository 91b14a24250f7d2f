"""The packed products under AddressSanitizer and UBSan: `make sanitize`. Needs gcc.

Every operand is copied into heap memory of exactly its size, so that a read or write beyond it is caught, for every
instruction set that this machine has, both dtypes, odd shapes, empty and full matrices, batches 1 to 8, one and two
threads.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor

from secateur import packed as module

SOURCE = Path(module.__file__).with_name("packed.c")
FLAGS = ["-O1", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-shared", "-fPIC"]
LIBRARY = "SECATEUR_SANITIZED"


def again() -> None:
    """Compile with the sanitizers and start over with their libraries in front of all others."""
    built = Path(mkdtemp()) / "packed.so"
    subprocess.run(["gcc", *FLAGS, str(SOURCE), "-o", str(built)], check=True)
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names]
    new = {LIBRARY: str(built), "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    os.execve(sys.executable, [sys.executable, __file__], os.environ | new)


def main() -> None:
    if LIBRARY not in os.environ:
        again()
    compiled, heap = ctypes.CDLL(os.environ[LIBRARY]), ctypes.CDLL(None)
    for name in ("secateur_multiply_f32", "secateur_multiply_bf16"):
        sizes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        getattr(compiled, name).argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 5, *sizes]
    heap.malloc.restype, heap.malloc.argtypes, heap.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )

    def exact(tensor: Tensor) -> int:
        size = tensor.numel() * tensor.element_size()
        place = heap.malloc(size)
        ctypes.memmove(place, tensor.contiguous().data_ptr(), size)
        return place

    shapes = [(37, 128), (1, 64), (13, 1), (9, 65), (64, 100), (5, 1376)]
    count = 0
    for dtype, (rows, columns), sparsity in product((torch.float32, torch.bfloat16), shapes, (0.0, 0.5, 0.97, 1.0)):
        weight = torch.randn(rows, columns).masked_fill(torch.rand(rows, columns) < sparsity, 0).to(dtype)
        held = module.pack(weight)
        multiply = getattr(compiled, f"secateur_multiply_{'bf16' if dtype == torch.bfloat16 else 'f32'}")
        for batch, use, threads in product((1, 2, 3, 8), range(compiled.secateur_isa() + 1), (1, 2)):
            x = torch.zeros(batch, held.bitmap.shape[1] * module.WORD, dtype=dtype)
            x[:, :columns] = torch.randn(batch, columns).to(dtype)
            y = torch.empty(batch, rows)
            places = [exact(tensor) for tensor in (held.bitmap, held.values, held.starts, x, y)]
            assert multiply(use, *places, rows, held.bitmap.shape[1], batch, threads) == 0
            ctypes.memmove(y.data_ptr(), places[-1], 4 * y.numel())
            assert (y - x[:, :columns].double() @ weight.double().T).abs().max() < 1e-3
            for place in places:
                heap.free(place)
            count += 1
        unpack = getattr(compiled, f"secateur_unpack_{'bf16' if dtype == torch.bfloat16 else 'f32'}")
        unpack.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
        for use in range(compiled.secateur_isa() + 1):
            out = torch.empty(rows, held.bitmap.shape[1] * module.WORD, dtype=dtype)
            places = [exact(tensor) for tensor in (held.bitmap, held.values, held.starts, out)]
            unpack(use, *places, rows, held.bitmap.shape[1], 2)
            ctypes.memmove(out.data_ptr(), places[-1], out.numel() * out.element_size())
            assert torch.equal(out[:, :columns], weight)
            for place in places:
                heap.free(place)
            count += 1
    print(f"{count} products and unpackings, nothing found")


if __name__ == "__main__":
    main()
