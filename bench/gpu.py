"""All products for a GPU on a lent H100 or H200: right first, then timed beside the dense product. Under five minutes.

    python bench/gpu.py --json bench/results/gpu.json
    python bench/gpu.py --dry-run            # the script alone, on tiny matrices and a CPU, through stand-ins

Decoding (1 to 8 rows of x): every kernel reads copies of its matrix in turn, which together are four times the cache of
the device, so that weights come from memory as they do in a model. Prefill (16 to 4096 rows): torch's 2:4 products. One
pass over the copies is a CUDA graph, so no launch is timed; a figure is the median of the replays, divided by copies.
A kernel that fails, whatever it raises, is printed and left out, for the device is not lent twice; one that leaves the
device unusable makes the script begin again without it. What does not fit in `--seconds` is listed as skipped.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import torch
from common import parser, write
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from secateur.deployment.runtimes.semi_structured import PRODUCTS, Algorithm
from secateur.errors import in_one_line
from secateur.kernels import bitmap
from secateur.kernels import two_of_four as nm
from secateur.kernels.device import milliseconds
from secateur.kernels.packed import Packed
from secateur.system.machine import machine, versions

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (28672, 8192)]
PREFILL_SHAPES = SHAPES[:4]
BATCHES, TOKENS, SPARSITIES = (1, 2, 4, 8), (16, 64, 256, 1024, 4096), (0.5, 0.6, 0.7, 0.8)
CHECKED_SHAPES = [(64, 128), (1024, 4096), (96, 4160)]
BLOCK_OF_ROWS = 1024
"""So many rows are packed by a CPU and repeated down a matrix that is only timed."""
DECODE_SHARE = 0.65
"""Of the time, for the tables of decoding."""


class Kernel(NamedTuple):
    """A product to time: `prepare(weight [rows, columns])` gives the matrix in its form, and `settle(held, x, search)`
    the call that takes such a matrix, after a search for the best way where that is asked for.
    """

    sparsity: float | None
    prepare: Callable[[Tensor], Any]
    settle: Callable[[Any, Tensor, bool], Callable[[Any], Tensor]]


class Unusable(Exception):
    """The device answers nothing any more after the kernel of that name."""


@dataclass
class Session:
    """Where one run measures, and what it has found."""

    device: torch.device
    clock: Callable[[list[Callable[[], object]]], float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def fail(self, name: str, where: str, error: BaseException) -> None:
        self.failures.append(f"{name}, {where}: {type(error).__name__}: {in_one_line(error)}")
        print(f"  FAILED {self.failures[-1]}", flush=True)
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as lasting:
                raise Unusable(name) from lasting


def read(held: Any) -> int:
    """The bytes of a matrix that one product reads."""
    if isinstance(held, tuple):
        return sum(part.nbytes for part in held)
    return held.nbytes if isinstance(held, Tensor) else held.bytes


def torch_kernel(name: str, *, search: bool = True) -> Kernel:
    """One of the products that the runtime chooses from, with the algorithm that its library finds for x."""
    product = PRODUCTS[name]

    def settle(held: Any, x: Tensor, wanted: bool) -> Callable[[Any], Tensor]:
        algorithm = product.search(held, x, None) if search and wanted else Algorithm()
        return lambda one: product.multiply(one, x, None, algorithm)

    return Kernel(0.5, lambda weight: product.prepare(weight, "a matrix"), settle)


def two_of_four(held: nm.TwoOfFour, x: Tensor, search: bool) -> Callable[[Any], Tensor]:
    configuration = None if search else nm.FIXED
    return lambda one: nm.multiply(one, x, configuration=configuration)


def pack_repeated(weight: Tensor) -> Packed:
    """A packed matrix as large as `weight`, whose rows are the first ones of it again and again."""
    part = bitmap.pack(weight[: min(len(weight), BLOCK_OF_ROWS)], name="a matrix", device=weight.device)
    times, kept = math.ceil(len(weight) / part.rows), int(part.starts[-1])
    if times == 1:
        return part
    steps = torch.arange(times, device=weight.device)[:, None] * kept
    starts = torch.cat([(part.starts[:-1] + steps).flatten(), part.starts.new_tensor([kept * times])])
    values = torch.cat([part.values[:kept].repeat(times), part.values[kept:]])
    rows = len(weight)
    return Packed(part.bitmap.repeat(times, 1)[:rows].contiguous(), values, starts[: rows + 1].clone(), part.columns)


def kernels(device: torch.device) -> dict[str, Kernel]:
    """All products by name, the dense one first; on a CPU there are stand-ins that unpack."""
    on_device = device.type == "cuda"
    found = {
        "dense": Kernel(None, lambda weight: weight, lambda held, x, _: lambda one: linear(x, one)),
        "2:4": Kernel(
            0.5, lambda weight: nm.pack(weight, name="a matrix", device=device),
            two_of_four if on_device else lambda held, x, _: lambda one: linear(x, nm.unpack(one)),
        ),
    }  # fmt: skip
    for sparsity in SPARSITIES:
        found[f"bitmap {sparsity:.0%}"] = Kernel(
            sparsity, pack_repeated,
            lambda held, x, _: lambda one: bitmap.multiply(one, x) if on_device else linear(x, bitmap.unpack(one)),
        )  # fmt: skip
    found["torch CUTLASS"] = torch_kernel("CUTLASS")
    if not on_device:
        unpacked = lambda held, x, _: lambda one: linear(x, sparse_semi_structured_to_dense_cutlass(*one))  # noqa: E731
        found["torch CUTLASS"] = found["torch CUTLASS"]._replace(settle=unpacked)
    found["torch cuSPARSELt"] = torch_kernel("cuSPARSELt")
    found["torch cuSPARSELt, default"] = torch_kernel("cuSPARSELt", search=False)
    return found


def matrix(rows: int, columns: int, kernel: Kernel, name: str, device: torch.device) -> Tensor:
    """A random bfloat16 matrix with the zeros that a kernel is for."""
    weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    if kernel.sparsity is not None and name.startswith("bitmap"):
        return weight.masked_fill_(torch.rand(rows, columns, device=device) < kernel.sparsity, 0)
    if kernel.sparsity is not None:
        groups = weight.view(-1, 4)
        groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
    return weight


def graph_microseconds(calls: list[Callable[[], object]]) -> float:
    """Of one call: the median over replays of a graph that has all of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for number in range(13):
        taken = milliseconds(graph.replay)
        if number >= 3:
            times.append(1e3 * taken / len(calls))
    return statistics.median(times)


def cpu_microseconds(calls: list[Callable[[], object]]) -> float:
    started = perf_counter()
    for call in calls:
        call()
    return 1e6 * (perf_counter() - started) / len(calls)


def check(session: Session, table: dict[str, Kernel]) -> None:
    """Leave the kernels out of the table whose products differ from float64 by more than bfloat16 rounds."""
    print("correctness against float64, bfloat16: ‖difference‖ / ‖product‖")
    for name, kernel in list(table.items()):
        worst = 0.0
        try:
            for rows, columns in CHECKED_SHAPES:
                weight = matrix(rows, columns, kernel, name, session.device)
                held = kernel.prepare(weight)
                for batch in (*range(1, 9), 11, 64):  # searched at the first and the last one, to save time
                    x = torch.randn(batch, columns, device=session.device, dtype=torch.bfloat16)
                    wanted = x.double() @ weight.double().T
                    got = kernel.settle(held, x, batch in (1, 64))(held)
                    worst = max(worst, ((got.double() - wanted).norm() / wanted.norm()).item())
            if not worst <= 5e-3:
                raise ArithmeticError(f"the products differ by {worst:.1e} of their norm; 5e-3 is allowed")
            print(f"  {name:36s} {worst:.1e}", flush=True)
            session.rows.append({"table": "correctness", "kernel": name, "difference": worst})
        except Exception as error:
            session.fail(name, "correctness", error)
            if name != "dense":
                del table[name]


def timed(
    session: Session, kind: str, table: dict[str, Kernel], shapes: list[tuple[int, int]], rows_of_x: tuple[int, ...],
    cache: int, ends: float,
) -> None:  # fmt: skip
    """Time every kernel on every shape, on copies that are four times the cache, two at least."""
    for rows, columns in shapes:
        print(f"{kind} {rows}x{columns}: microseconds, GB/s, times faster than dense", flush=True)
        dense: dict[int, float] = {}
        for name, kernel in table.items():
            if monotonic() > ends:
                session.skipped.append(f"{kind} {rows}x{columns} {name}")
                continue
            try:
                held = [kernel.prepare(matrix(rows, columns, kernel, name, session.device))]
                held += [deepcopy(held[0]) for _ in range(max(1, math.ceil(4 * cache / read(held[0])) - 1))]
                line = f"  {name:36s}"
                for count in rows_of_x:
                    x = torch.randn(count, columns, device=session.device, dtype=torch.bfloat16)
                    call = kernel.settle(held[0], x, True)
                    taken = session.clock([partial(call, one) for one in held])
                    if name == "dense":
                        dense[count] = taken
                    ratio = dense[count] / taken if count in dense else None
                    rate = read(held[0]) / taken / 1e3
                    session.rows.append({
                        "table": kind, "shape": [rows, columns], "rows_of_x": count, "kernel": name,
                        "microseconds": taken, "gigabytes_a_second": rate, "faster_than_dense": ratio,
                        "bytes": read(held[0]), "copies": len(held),
                    })  # fmt: skip
                    line += f" | {count}: {taken:.1f} {rate:.0f} {'-' if ratio is None else f'{ratio:.2f}'}"
                print(line, flush=True)
            except Exception as error:
                session.fail(name, f"{kind} {rows}x{columns}", error)
            held = []
            if session.device.type == "cuda":
                torch.cuda.empty_cache()


def environment(device: torch.device) -> dict[str, Any]:
    """Machine and versions."""
    held, packages = machine(), versions()
    if device.type == "cuda":
        found, driver = torch.cuda.get_device_properties(device), Path("/proc/driver/nvidia/version")
        held |= {"capability": [found.major, found.minor], "processors": found.multi_processor_count}
        held |= {"device_bytes": found.total_memory, "cache_bytes": found.L2_cache_size}
        packages |= {"cuda": str(torch.version.cuda), "cusparselt": str(torch.backends.cusparselt.version())}
        packages |= {"triton": str(getattr(sys.modules.get("triton"), "__version__", None))}
        packages |= {"driver": driver.read_text().splitlines()[0] if driver.exists() else "unknown"}
    return {"machine": held, "versions": packages}


@torch.no_grad()
def main() -> None:
    declared = parser(
        __doc__,
        dict(seconds=(240.0, "nothing is begun after so many")),
        dict(dry_run=(False, "tiny matrices on the CPU, through stand-ins"), json=Path),
    )
    declared.add_argument("--without", action="append", default=[], help="a kernel to leave out; may be repeated")
    chosen = declared.parse_args()
    begun = monotonic()
    if chosen.dry_run:
        device, clock, cache = torch.device("cpu"), cpu_microseconds, 1000
        shapes, prefill, tokens = [(64, 128), (2 * BLOCK_OF_ROWS + 32, 64)], [(64, 128)], (16, 64)
    elif torch.cuda.is_available():
        device, clock = torch.device("cuda", torch.cuda.current_device()), graph_microseconds
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        shapes, prefill, tokens = SHAPES, PREFILL_SHAPES, TOKENS
    else:
        raise SystemExit("There is no CUDA device. --dry-run exercises the script on a CPU.")
    torch.manual_seed(0)
    session = Session(device, clock)
    print(torch.cuda.get_device_name() if device.type == "cuda" else "dry run on the CPU", torch.__version__)
    table = {name: kernel for name, kernel in kernels(device).items() if name not in chosen.without}
    session.failures += [
        f"{name}: left out, as asked for or because it made the device unusable" for name in chosen.without
    ]
    try:
        check(session, table)
        timed(session, "decode", table, shapes, BATCHES, cache, begun + DECODE_SHARE * chosen.seconds)
        of_torch = {name: kernel for name, kernel in table.items() if name == "dense" or name.startswith("torch")}
        timed(session, "prefill", of_torch, prefill, tokens, 0, begun + chosen.seconds)
    except Unusable as error:
        left = chosen.seconds - (monotonic() - begun)
        print(f"the device is unusable after {error}; beginning again without it", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.argv, "--without", str(error), "--seconds", f"{left:.0f}"])
    for skipped in session.skipped:
        print(f"skipped, out of time: {skipped}")
    print(f"{monotonic() - begun:.0f} seconds, {len(session.rows)} rows, {len(session.failures)} failures")
    found = {"rows": session.rows, "failures": session.failures, "skipped": session.skipped}
    write(chosen.json, command=sys.argv, **environment(device), seconds=monotonic() - begun, **found)


if __name__ == "__main__":
    main()
