"""What other people's quantisers leave of the zeros of a pruned matrix.

    python bench/quantisers.py --json bench/results/quantisers.json

Each library packs a matrix [256, 512] of Gaussian weights, pruned to 2:4, and decodes it again with its own code: with
the mask by magnitude, and with a random one, which stands for any that is not by magnitude (Wanda's, SparseGPT's).
Counted: pruned weights that came back, groups of four with more than two weights, and kept weights that became zero.
The libraries are fetched into --folder beside the packages that are installed here; one that cannot be fetched or does
not run is named and left out. Everything runs on the processor. Ends with the table of docs/quantising.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import fetched, options, write
from torch import Tensor

PACKAGES = {
    "gguf": "0.19.0",
    "bitsandbytes": "0.50.2",
    "torchao": "0.18.0",
    "hqq": "0.2.8.post1",
    "optimum-quanto": "0.2.7",
    "compressed-tensors": "0.20.1",
    "onnxruntime": "1.32.0",
    "mlx": "0.32.4",
}
BESIDE = {
    "hqq": ["termcolor==3.3.0"],
    "optimum-quanto": ["ninja"],
    "compressed-tensors": ["loguru"],
    "mlx": ["mlx-cpu==0.32.4"],
}
"""What these need that is not installed with Secateur."""
Quantise = Callable[[Tensor], Tensor]


def of_gguf() -> Iterator[tuple[str, Quantise]]:
    gguf = import_module("gguf")
    for name in ("Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "TQ1_0", "TQ2_0", "MXFP4"):
        kind = gguf.GGMLQuantizationType[name]
        yield name, lambda w, kind=kind: torch.from_numpy(gguf.dequantize(gguf.quantize(w.numpy(), kind), kind))


def of_bitsandbytes() -> Iterator[tuple[str, Quantise]]:
    made = import_module("bitsandbytes.functional")
    for name in ("nf4", "fp4"):
        yield (
            f"{name.upper()}, blocks of 64",
            lambda w, name=name: made.dequantize_4bit(*made.quantize_4bit(w, quant_type=name)),
        )
    yield "8 bits, blocks", lambda w: made.dequantize_blockwise(*made.quantize_blockwise(w))

    def rows(w: Tensor) -> Tensor:
        codes, scales, _ = made.int8_vectorwise_quant(w.half())
        return made.int8_vectorwise_dequant(codes, scales)

    yield "int8, rows", rows


def of_torchao() -> Iterator[tuple[str, Quantise]]:
    quantization = import_module("torchao.quantization")
    granularity = import_module("torchao.quantization.granularity")
    mapping = import_module("torchao.quantization.quant_primitives").MappingType
    dtypes: Any = torch  # its stubs know no int4

    def of(config: Any) -> Quantise:
        def quantise(w: Tensor) -> Tensor:
            linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
            quantization.quantize_(linear, config)
            packed: Any = linear.weight
            return packed.dequantize()

        return quantise

    yield "int8", of(quantization.Int8WeightOnlyConfig())
    yield "float8", of(quantization.Float8WeightOnlyConfig())
    for name, kind in (("symmetric", mapping.SYMMETRIC), ("asymmetric", mapping.ASYMMETRIC)):
        config = quantization.IntxWeightOnlyConfig(
            weight_dtype=dtypes.int4, granularity=granularity.PerGroup(64), mapping_type=kind
        )
        yield f"int4, groups of 64, {name}", of(config)


def of_hqq() -> Iterator[tuple[str, Quantise]]:
    quantizer = import_module("hqq.core.quantize").Quantizer
    for name, bits, settings in (
        ("4 bits, groups of 64", 4, {}),
        ("4 bits, groups of 64, whole zero, not optimised", 4, dict(round_zero=True, optimize=False)),
        ("8 bits, groups of 64", 8, {}),
    ):

        def quantise(w: Tensor, bits: int = bits, settings: dict[str, Any] = settings) -> Tensor:
            packed, meta = quantizer.quantize(
                w, nbits=bits, group_size=64, device="cpu", compute_dtype=torch.float32, **settings
            )
            return quantizer.dequantize(packed, meta).view(w.shape)

        yield name, quantise


def of_quanto() -> Iterator[tuple[str, Quantise]]:
    quanto = import_module("optimum.quanto")
    for name in ("qint8", "qfloat8", "qint4", "qint2"):

        def quantise(w: Tensor, name: str = name) -> Tensor:
            linear = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False))
            linear[0].weight = torch.nn.Parameter(w.clone(), requires_grad=False)
            quanto.quantize(linear, weights=getattr(quanto, name))
            quanto.freeze(linear)
            packed: Any = linear[0].weight
            return packed.dequantize()

        yield name, quantise


def of_compressed_tensors() -> Iterator[tuple[str, Quantise]]:
    quantization = import_module("compressed_tensors.quantization")
    forward = import_module("compressed_tensors.quantization.lifecycle.forward")
    helpers = import_module("compressed_tensors.quantization.utils")
    for bits in (8, 4):
        for name, symmetric in (("symmetric", True), ("asymmetric", False)):
            arguments = quantization.QuantizationArgs(
                num_bits=bits, symmetric=symmetric, strategy="group", group_size=128
            )

            def quantise(w: Tensor, arguments: Any = arguments) -> Tensor:
                groups = w.unflatten(-1, (-1, 128))
                scale, zero = helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
                return forward.fake_quantize(w, scale, zero, arguments)

            yield f"int{bits}, groups of 128, {name}", quantise


def of_onnxruntime() -> Iterator[tuple[str, Quantise]]:
    pack = import_module("onnxruntime.capi._pybind_state")
    for name, symmetric in (("symmetric", True), ("asymmetric", False)):

        def quantise(w: Tensor, symmetric: bool = symmetric) -> Tensor:
            x, block = w.T.contiguous().numpy(), 32
            rows, columns = x.shape
            blocks = rows // block
            packed = torch.zeros(columns, blocks, block // 2, dtype=torch.uint8).numpy()
            scales = torch.zeros(columns * blocks).numpy()
            zeros = torch.zeros(columns * ((blocks + 1) // 2), dtype=torch.uint8).numpy()
            pack.quantize_matmul_4bits(packed, x, scales, zeros, block, columns, rows, symmetric)
            codes = torch.from_numpy(packed)
            numbers = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float()
            nibbles = torch.from_numpy(zeros).view(columns, -1)
            points = torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(-2)[:, :blocks].float()
            points = torch.full_like(points, 8) if symmetric else points
            scale = torch.from_numpy(scales).view(columns, blocks, 1)
            return ((numbers - points.unsqueeze(-1)) * scale).flatten(1)

        yield f"MatMulNBits, 4 bits, blocks of 32, {name}", quantise


def of_mlx() -> Iterator[tuple[str, Quantise]]:
    mx = import_module("mlx.core")
    ways: list[tuple[str, dict[str, Any]]] = [
        (f"affine, {bits} bits, groups of 64", dict(bits=bits, group_size=64)) for bits in (8, 4, 3, 2)
    ]
    ways += [(mode, dict(mode=mode)) for mode in ("mxfp4", "nvfp4", "mxfp8")]
    for name, settings in ways:

        def quantise(w: Tensor, settings: dict[str, Any] = settings) -> Tensor:
            numpy = import_module("numpy")
            packed = mx.quantize(mx.array(w.numpy()), **settings)
            return torch.from_numpy(numpy.array(mx.dequantize(*packed, **settings).astype(mx.float32)))

        yield name, quantise


QUANTISERS = {
    "gguf": of_gguf,
    "bitsandbytes": of_bitsandbytes,
    "torchao": of_torchao,
    "hqq": of_hqq,
    "optimum-quanto": of_quanto,
    "compressed-tensors": of_compressed_tensors,
    "onnxruntime": of_onnxruntime,
    "mlx": of_mlx,
}
"""By package: its ways, each a name and what packs a matrix and decodes it."""


def pruned(score: Tensor, weight: Tensor) -> Tensor:
    """The weights with the two greatest scores in each four."""
    kept = score.unflatten(-1, (-1, 4)).argsort(-1).argsort(-1).flatten(-2) >= 2
    return weight * kept


def counted(before: Tensor, after: Tensor) -> dict[str, float]:
    """Shares: of pruned weights that came back, of kept ones that vanished, of groups with more than two."""
    zero, now = before == 0, after.reshape(before.shape).float() == 0
    crowded = (~now).unflatten(-1, (-1, 4)).sum(-1) > 2
    return {
        "came_back": (zero & ~now).sum().item() / zero.sum().item(),
        "vanished": (~zero & now).sum().item() / (~zero).sum().item(),
        "crowded": crowded.float().mean().item(),
    }


def measured(package: str) -> list[dict[str, Any]]:
    """The rows of a package."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(256, 512)
    masked = {"magnitude": pruned(weight.abs(), weight), "random": pruned(torch.rand(256, 512), weight)}
    rows = []
    for name, quantise in QUANTISERS[package]():
        with torch.no_grad():
            found = {kind: counted(one, quantise(one)) for kind, one in masked.items()}
        rows.append({"package": package, "version": version(package), "way": name, **found})
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table of docs/quantising.md."""
    magnitude, random = row["magnitude"], row["random"]
    holds = "yes" if not max(magnitude["crowded"], random["crowded"]) else "**no**"
    return (
        f"| {row['package']} {row['version']} | {row['way']} | {1 - magnitude['came_back']:.1%} | {holds} | "
        f"{magnitude['vanished']:.2%} / {random['vanished']:.2%} |"
    )


def main() -> None:
    given = options(__doc__, dict(folder=Path("out/quantisers"), json=Path, package=str))
    if given.package:  # in a process of its own
        print(json.dumps(measured(given.package)))
        return
    rows = []
    for package in PACKAGES:
        try:
            pinned = [f"{package}=={PACKAGES[package]}", *BESIDE.get(package, [])]
            place = fetched(given.folder / package, pinned)
            command = [sys.executable, "-W", "ignore", "-c", RUN, str(place.resolve()), __file__, package]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows += json.loads(done.stdout.splitlines()[-1])
        except subprocess.CalledProcessError as error:
            print(f"{package} {PACKAGES[package]} does not run here: {(error.stderr or '').strip()[-300:]}")
    print("| quantiser | way | zeros kept | 2:4 holds | kept weights that become zero: mask by magnitude / random |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(map(line, rows)))
    write(given.json, command=["bench/quantisers.py"], rows=rows)


RUN = (
    "import runpy, sys; place, script, package = sys.argv[1:]; sys.path[:0] = [place, script.rpartition('/')[0]];"
    "sys.argv = [script, '--package', package]; runpy.run_path(script, run_name='__main__')"
)


if __name__ == "__main__":
    main()
