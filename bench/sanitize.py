"""The C sources under AddressSanitizer and UBSan: `make sanitize`. Needs gcc, and libsimde-dev for AVX-512.

Every operand is copied into heap memory of exactly its size, so that a read or write beyond it is caught, for every
instruction set, dtype, odd shapes, empty and full matrices, batches 1 to 8, one and two threads. Where the machine has
no AVX-512 its routines are compiled a second time with every intrinsic in plain C (SIMDe), so that they are at least
checked for what they compute; nothing is known of their speed then.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor

from secateur.kernels import library as native
from secateur.kernels import packed as module
from secateur.kernels.counts import BITS, Counts, count_in_torch
from secateur.kernels.gram import KINDS
from secateur.kernels.masks import best_of_groups_in_torch, without_lowest_in_torch
from secateur.kernels.rounding import Levels, best_scales_in_torch, round_columns_in_torch
from secateur.methods.column_sweep import sweep_block_in_torch
from secateur.methods.patterns import NM, Unstructured

SOURCES = [
    str(Path(native.__file__).parent / "native" / f"{name}.c")
    for name in ("packed", "packed_levels", "dense", "masks", "counts", "sweep", "gram", "round")
]
FLAGS = [
    "-O1",
    "-g",
    "-fopenmp",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover",
    "-fno-omit-frame-pointer",
    "-shared",
    "-fPIC",
]
EMULATED = ["-DEMULATED", f"-I{Path(__file__).parent}"]
LIBRARY = "SECATEUR_SANITIZED"
SHAPES = [(37, 128), (1, 64), (13, 1), (9, 65), (64, 100), (5, 1376)]


def again(flags: list[str]) -> int:
    """Compile with the sanitizers and run this file again with their libraries in front of all others."""
    built = Path(mkdtemp()) / "native.so"
    subprocess.run(["gcc", *FLAGS, *flags, *SOURCES, "-o", str(built)], check=True)
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names]
    new = {LIBRARY: str(built), "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([sys.executable, __file__], env=os.environ | new).returncode


def main() -> None:
    if LIBRARY in os.environ:
        compiled = native.declared(ctypes.CDLL(os.environ[LIBRARY]))
        best = compiled.secateur_isa()
        emulated = native.ISAS[best] != native.isa()
        uses = list(range(native.ISAS.index("avx512") if emulated else 0, best + 1))
        check(compiled, uses)
        check_levels(compiled, uses)
        check_rounding(compiled, uses)
        check_masks(compiled)
        check_counts(compiled, uses)
        check_sweep(compiled, uses)
        return check_gram(compiled, uses)
    failed = again([])
    if native.isa() != native.ISAS[-1]:
        if Path("/usr/include/simde/x86/avx512.h").exists():
            failed = again(EMULATED) or failed
        else:
            print(f"{native.ISAS[-1]} was not checked: this machine lacks it, and libsimde-dev is not installed")
    sys.exit(failed)


class Heap:
    """Copies of tensors on the heap, of exactly their size."""

    def __init__(self) -> None:
        self.system, self.places = ctypes.CDLL(None), []
        self.system.malloc.restype, self.system.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        self.system.free.argtypes = [ctypes.c_void_p]

    def put(self, *tensors: Tensor) -> list[int]:
        for tensor in tensors:
            held, size = tensor.contiguous(), tensor.numel() * tensor.element_size()
            self.places.append(self.system.malloc(size))
            ctypes.memmove(self.places[-1], held.data_ptr(), size)
        return self.places[-len(tensors) :]

    def empty(self) -> None:
        while self.places:
            self.system.free(self.places.pop())


def check(compiled: ctypes.CDLL, uses: list[int]) -> None:
    heap, count = Heap(), 0
    kinds = (torch.float32, torch.bfloat16, torch.int8)
    for dtype, (rows, columns), sparsity in product(kinds, SHAPES, (0.0, 0.5, 0.97, 1.0)):
        weight = torch.randn(rows, columns).masked_fill(torch.rand(rows, columns) < sparsity, 0)
        held = module.pack_int8(weight) if dtype == torch.int8 else module.pack(weight.to(dtype))
        kind, words = module.KINDS[dtype], held.bitmap.shape[1]
        scales = [] if held.scales is None else [held.scales]
        dense = held.dense().double()
        for batch, use, threads in product((1, 2, 3, 5, 8), uses, (1, 2)):
            x = torch.zeros(batch, words * module.WORD, dtype=torch.float32 if scales else dtype)
            x[:, :columns] = torch.randn(batch, columns).to(x.dtype)
            y = torch.empty(batch, rows)
            places = heap.put(held.bitmap, held.values, held.starts, *scales, x, y)
            multiply = getattr(compiled, f"secateur_multiply_{kind}")
            assert multiply(use, *places, rows, words, batch, threads) == 0
            ctypes.memmove(y.data_ptr(), places[-1], 4 * y.numel())
            assert (y - x[:, :columns].double() @ dense.T).abs().max() < 1e-2
            heap.empty()
            count += 1
        for name, out_dtype in (("unpack_f32", torch.float32), ("unpack_bf16", torch.bfloat16),
                                ("widen_bf16", torch.float32), ("widen_i8", torch.float32)):  # fmt: skip
            for use in uses if name.endswith(kind) else ():
                out = torch.empty(rows, words * module.WORD, dtype=out_dtype)
                places = heap.put(held.bitmap, held.values, held.starts, *scales, out)
                where = [*places[:3], places[3] if scales else None, places[-1]]
                getattr(compiled, f"secateur_{name}")(use, *where, rows, words, 2)
                ctypes.memmove(out.data_ptr(), places[-1], out.numel() * out.element_size())
                assert torch.equal(out[:, :columns].double(), dense)
                heap.empty()
                count += 1
        for use in filter(None, uses) if columns % 64 == 0 and dtype != torch.float32 else ():
            y, x = torch.empty(rows), torch.randn(columns)
            if dtype == torch.int8:
                whole = (dense / held.scales[:, None].clamp_min(1e-30)).round().to(torch.int8)  # type: ignore[index]
                places = heap.put(whole, *scales, x, y)
                assert compiled.secateur_dense_i8(use, *places, rows, columns, 2) == 0
            else:
                x = x.bfloat16()
                places = heap.put(dense.bfloat16(), x, y)
                assert compiled.secateur_dense_bf16(use, *places, rows, columns, 2) == 0
            ctypes.memmove(y.data_ptr(), places[-1], 4 * rows)
            assert (y - dense @ x.double()).abs().max() < 1e-2
            heap.empty()
            count += 1
    print(f"{count} products and unpackings, {', '.join(native.ISAS[use] for use in uses)}: nothing found")


def check_levels(compiled: ctypes.CDLL, uses: list[int]) -> None:
    heap, count = Heap(), 0
    for bits, (rows, columns), sparsity in product((4, 3, 2), [*SHAPES, (6, 1344)], (0.0, 0.5, 0.97, 1.0)):
        half, words = 2 ** (bits - 1), -(-columns // module.WORD)
        kept = torch.rand(rows, columns) >= sparsity
        levels = torch.randint(-half, half, (rows, columns)).float() * kept
        groups = words if columns % module.WORD == 0 else 1
        held = module.pack_levels(levels, torch.rand(rows, groups).bfloat16(), bits)
        assert held.scales is not None
        stored, sizes = (held.bitmap, held.values, held.starts, held.scales), (rows, words, groups, bits)
        dense = levels * held.scales.float().repeat_interleave(-(-columns // groups), 1)[:, :columns]
        places, sums = heap.put(*stored, torch.empty(rows)), torch.empty(rows)
        compiled.secateur_sums_levels(*places, *sizes, 2)
        ctypes.memmove(sums.data_ptr(), places[-1], 4 * rows)
        assert torch.allclose(sums, dense.sum(1), atol=1e-3)
        for batch, use, threads in product((1, 2, 3, 5, 8), uses, (1, 2)):
            x = torch.zeros(batch, words * module.WORD)
            x[:, :columns] = torch.randn(batch, columns)
            y = torch.empty(batch, rows)
            places = heap.put(*stored, sums, x, y)
            assert compiled.secateur_multiply_levels(use, *places, *sizes, batch, threads) == 0
            ctypes.memmove(y.data_ptr(), places[-1], 4 * y.numel())
            wanted = x[:, :columns].double() @ dense.double().T
            assert (y - wanted).abs().max() < 1e-4 * (1 + dense.abs().sum(1).max() * x.abs().max())
            heap.empty()
            count += 1
        for use in uses:
            out = torch.empty(rows, words * module.WORD)
            places = heap.put(*stored, out)
            compiled.secateur_widen_levels(use, *places, *sizes, 2)
            ctypes.memmove(out.data_ptr(), places[-1], 4 * out.numel())
            assert torch.equal(out[:, :columns], dense)
            heap.empty()
            count += 1
    print(f"{count} products and unpackings of levels: nothing found")


def check_rounding(compiled: ctypes.CDLL, uses: list[int]) -> None:
    heap, count = Heap(), 0
    integers, floats = Levels(-4.0, 3.0, 0.0, 1.0), Levels(-6.0, 6.0, 0.5, 0.5)
    for use, (rows, width), levels, threads in product(uses, [(1, 1), (37, 24), (16, 120)], (integers, floats), (1, 2)):
        values, units = torch.randn(rows, width), torch.rand(rows, width) * (torch.rand(rows, width) < 0.6)
        factor = torch.randn(width, width).tril() / width + torch.eye(width)
        zeros = torch.randint(8, (rows, width)).float() if levels is integers else None
        for old, zero_points in ((None, None), (torch.randn(rows, width), zeros)):
            wanted = values.clone()
            round_columns_in_torch(wanted, units, factor, levels, old=old, zero_points=zero_points)
            place, found = heap.put(values)[0], torch.empty_like(values)
            others = [None if one is None else heap.put(one)[0] for one in (old, units, zero_points, factor)]
            assert compiled.secateur_round_columns(use, place, *others, rows, width, *levels, threads) == 0
            ctypes.memmove(found.data_ptr(), place, 4 * values.numel())
            assert (found - wanted).abs().gt(1e-4).float().mean() < 0.02  # a tie may fall to the other side
            heap.empty()
            count += 1
    for use, (rows, groups, size), threads in product(uses, [(1, 1, 1), (9, 3, 64), (5, 2, 20)], (1, 2)):
        weight, importance, scales = (
            torch.randn(rows, groups, size),
            torch.rand(groups, size),
            torch.rand(7, rows, groups) + 0.1,
        )
        places = heap.put(weight, importance, scales)
        chosen = torch.empty(rows, groups, dtype=torch.int64)
        (place,) = heap.put(chosen)
        sizes = (rows, groups, size, len(scales), *integers, threads)
        assert compiled.secateur_best_scales(use, *places, None, place, *sizes) == 0
        ctypes.memmove(chosen.data_ptr(), place, 8 * chosen.numel())
        assert torch.equal(chosen, best_scales_in_torch(weight, importance, scales, integers))
        heap.empty()
        count += 1
    print(f"{count} blocks rounded and scales searched: nothing found")


def check_masks(compiled: ctypes.CDLL) -> None:
    heap, count = Heap(), 0

    def compare(expected: Tensor, call: Callable[..., int], scores: Tensor, *rest: int) -> int:
        places = heap.put(scores, torch.zeros_like(expected))
        assert call(*places, *rest) == 0
        kept = torch.empty_like(expected)
        ctypes.memmove(kept.data_ptr(), places[-1], kept.numel())
        assert torch.equal(kept, expected)
        heap.empty()
        return 1

    for (rows, columns), threads in product([(1, 1), (5, 7), (3, 1030), (2, 512)], (1, 2, 3)):
        for scores in (torch.randn(rows, columns), torch.randint(3, (rows, columns)).float(),
                       torch.randn(rows, columns).masked_fill(torch.rand(rows, columns) < 0.4, torch.nan)):  # fmt: skip
            for removed in {1, columns // 2 or 1, columns}:
                shape, row = (rows, columns, removed, threads), scores[:1]
                expected = without_lowest_in_torch(scores, removed)
                count += compare(expected, compiled.secateur_without_lowest_rows, scores, *shape)
                expected = without_lowest_in_torch(row, removed)
                count += compare(expected, compiled.secateur_without_lowest, row, columns, removed, threads)
    for (n, m), groups, threads in product([(1, 2), (2, 4), (3, 8), (1, 3), (7, 16), (90, 200)], (1, 31, 70), (1, 2)):
        scores = torch.randint(5, (1, groups * m)).float()
        expected = best_of_groups_in_torch(scores, n, m)
        count += compare(expected, compiled.secateur_best_of_groups, scores, groups, m, n, threads)
    print(f"{count} masks: nothing found")


def check_counts(compiled: ctypes.CDLL, uses: list[int]) -> None:
    heap, checked, counts = Heap(), 0, (ctypes.c_int64 * 7)()
    for dtype, (rows, columns), use, threads in product(BITS, [(1, 1), (5, 7), (3, 1030), (2, 512)], uses, (1, 3)):
        weight = torch.randn(rows, columns).masked_fill(torch.rand(rows, columns) < 0.5, 0).to(dtype)
        places = heap.put(weight)
        compiled.secateur_count(use, dtype.itemsize, *places, rows, columns, *BITS[dtype], counts, threads)
        zeros, negative, nans, infs, *densest = counts
        assert Counts(zeros, negative, nans, infs, tuple(densest)) == count_in_torch(weight)
        heap.empty()
        checked += 1
    print(f"{checked} counts: nothing found")


def check_sweep(compiled: ctypes.CDLL, uses: list[int]) -> None:
    heap, count = Heap(), 0
    patterns = (None, NM(2, 4), NM(1, 3), NM(5, 8))
    for use, (rows, width), pattern, threads in product(uses, [(1, 24), (37, 24), (16, 120)], patterns, (1, 2)):
        values, kept = torch.randn(rows, width), torch.rand(rows, width) < 0.5
        inverse = torch.randn(width, width).triu() / width + torch.eye(width)
        alive = (torch.rand(width) < 0.9).float()
        places = heap.put(values, kept, inverse.T, alive)
        m, n = (pattern.m, pattern.n) if pattern else (4, 0)
        assert compiled.secateur_sweep_block(use, *places, rows, width, m, n, threads) == 0
        found, chosen = torch.empty_like(values), torch.empty_like(kept)
        ctypes.memmove(found.data_ptr(), places[0], 4 * values.numel())
        ctypes.memmove(chosen.data_ptr(), places[1], kept.numel())
        given = None if pattern else kept
        assert torch.equal(sweep_block_in_torch(values, inverse, alive, pattern or Unstructured(0.5), given), chosen)
        assert torch.allclose(values, found, rtol=1e-4, atol=1e-5)
        heap.empty()
        count += 1
    print(f"{count} blocks swept, {', '.join(native.ISAS[use] for use in uses)}: nothing found")


def check_gram(compiled: ctypes.CDLL, uses: list[int]) -> None:
    heap, count = Heap(), 0
    shapes = [(1, 1), (5, 48), (300, 50), (7, 1100), (4099, 20)]
    for use, (dtype, kind), shape, threads in product(uses, KINDS.items(), shapes, (1, 2)):
        x, other = (torch.randn(shape).to(dtype) for _ in "xy")
        columns = shape[1]
        for right in (x, other):
            total = torch.zeros(columns, columns, dtype=torch.float64)
            places = heap.put(x, right, total)
            where = [places[0], places[0] if right is x else places[1], places[2]]
            assert compiled.secateur_add_products(use, kind, *where, *shape, threads) == 0
            ctypes.memmove(total.data_ptr(), places[2], 8 * columns**2)
            assert torch.allclose(total, x.double().T @ right.double(), rtol=1e-4, atol=1e-2)
            heap.empty()
        total = torch.zeros(columns, dtype=torch.float64)
        places = heap.put(x, total)
        compiled.secateur_add_squares(use, kind, *places, *shape, threads)
        ctypes.memmove(total.data_ptr(), places[1], 8 * columns)
        assert torch.allclose(total, x.double().square().sum(0), rtol=1e-4)
        heap.empty()
        count += 3
    print(f"{count} sums over tokens, {', '.join(native.ISAS[use] for use in uses)}: nothing found")


if __name__ == "__main__":
    main()
