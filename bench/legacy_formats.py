"""Do our sparse formats agree with the last compressed-tensors that wrote them? Bit for bit, both ways.

    python bench/legacy_formats.py --json bench/results/legacy-formats.json

The demo model is pruned in several ways and written in both formats. An environment of its own, made in a temporary
folder, holds compressed-tensors 0.14.0.1 and transformers 4.57.6; there this script runs a second time and lets the
library read what we wrote, write the same model itself, and load both into a model. What it wrote is then read here.

The two halves import different versions of the same packages, so each imports inside its functions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import options, write
from torch import Tensor

PACKAGES = ("torch==2.13.0", "compressed-tensors==0.14.0.1", "transformers==4.57.6", "accelerate", "psutil")
CASES = (
    ("2:4", "sparse-24-bitmask"),
    ("1:4", "sparse-24-bitmask"),  # groups with one weight, so that a zero is stored as well
    ("2:4", "sparse-bitmask"),
    ("70%", "sparse-bitmask"),
)
LEGACY, PROMPT = "--legacy", torch.arange(1, 65).reshape(1, 64)


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and bytes are equal."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and torch.equal(
            found[name].contiguous().flatten().view(torch.uint8), tensor.contiguous().flatten().view(torch.uint8)
        )
        for name, tensor in wanted.items()
    )


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's shards."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def environment(folder: Path) -> Path:
    """The Python of a new environment with the old packages; torch and whatever else fits comes from this one."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, check=True
    )
    (Path(site.stdout.decode().strip()) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True, stderr=subprocess.DEVNULL)
    return python


def sparse_format(name: str) -> Any:
    """Our format of that name."""
    from secateur.deployment.formats import compressed_tensors

    return getattr(compressed_tensors, name.replace("-", "_"))


def write_all(folder: Path) -> None:
    """The pruned models in `dense` and, in the format, in `ours`, below a folder for every case."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import secateur
    from secateur.checkpoints.folder import open_checkpoint
    from secateur.checkpoints.result_folder import output
    from secateur.data import demo
    from secateur.system.progress import Progress

    shards = folder / "source"
    AutoModelForCausalLM.from_pretrained(demo.model_folder(), dtype="auto").save_pretrained(
        shards, max_shard_size="2MB"
    )
    AutoTokenizer.from_pretrained(demo.model_folder()).save_pretrained(shards)
    for number, (pattern, name) in enumerate(CASES):
        dense, ours = folder / str(number) / "dense", folder / str(number) / "ours"
        secateur.prune(
            shards, out=dense, method="magnitude", pattern=pattern, calibration="demo", samples=8, progress=Progress()
        )
        source = open_checkpoint(dense)
        with output(source, ours, overwrite=False, other_weights=source.bytes) as result:
            sparse_format(name).write(source, result.partial)
            result.finish({})


def read_all(folder: Path) -> list[bool]:
    """Whether we read what the library wrote as the dense model that it was made from."""
    agreed = []
    for number, (_, name) in enumerate(CASES):
        read, holds = sparse_format(name).read, sparse_format(name).holds
        assert read is not None
        assert holds is not None
        library = folder / str(number) / "library"
        agreed.append(holds(library) and equal(dict(read(library)), stored(folder / str(number) / "dense")))
    return agreed


def legacy(folder: Path) -> None:
    """Let the library read and write every case, and leave what agreed in `legacy.json`."""
    cases = [legacy_case(folder / str(number), name) for number, (_, name) in enumerate(CASES)]
    versions = {
        name: version(name) for name in ("compressed-tensors", "transformers", "accelerate", "torch", "safetensors")
    }
    (folder / "legacy.json").write_text(json.dumps({"versions": versions, "cases": cases}))


def legacy_case(folder: Path, name: str) -> dict[str, Any]:
    """What the library makes of one case, by its own code."""
    from compressed_tensors.compressors import ModelCompressor  # pyright: ignore[reportMissingImports]
    from compressed_tensors.config import SparsityCompressionConfig  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    dense, ours, library = folder / "dense", folder / "ours", folder / "library"
    said = json.loads((ours / "config.json").read_text())["quantization_config"]["sparsity_config"]
    settings = {key: value for key, value in said.items() if key not in ("format", "registry_requires_subclass")}
    compressor = ModelCompressor(sparsity_config=SparsityCompressionConfig.load_from_registry(name, **settings))
    read = dict(compressor.sparsity_compressor.decompress(str(ours)))

    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    model.save_pretrained(library, state_dict=compressor.compress(model), max_shard_size="2MB")
    compressor.update_config(str(library))
    configs = [json.loads((held / "config.json").read_text())["quantization_config"] for held in (ours, library)]
    return {
        "library_reads_ours": equal(read, stored(dense)),
        "stored_tensors_equal": equal(stored(ours), stored(library)),
        "config_equal": configs[0] == configs[1],
        "bytes_of_dense": sum(t.nbytes for t in stored(ours).values()) / sum(t.nbytes for t in stored(dense).values()),
        "transformers": loaded(ours, model),
    }


def loaded(folder: Path, wanted: Any) -> str:
    """Whether transformers loads the folder as the model that was wanted, in words."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        default = AutoModelForCausalLM.from_pretrained(folder).dtype
        with torch.no_grad():
            logits = model(PROMPT).logits, wanted(PROMPT).logits
    except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
        return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    weights = equal(dict(model.named_parameters()), dict(wanted.named_parameters()))
    return f"weights equal: {weights}, logits equal: {torch.equal(*logits)}, dtype where none is asked for: {default}"


def main() -> None:
    chosen = options(__doc__, dict(json=Path))
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_all(folder)
        python = environment(folder / "environment")
        subprocess.run([python, __file__, LEGACY, folder], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        found = json.loads((folder / "legacy.json").read_text())
        lines = [
            {"pattern": pattern, "format": name, "ours_reads_library": read, **case}
            for (pattern, name), read, case in zip(CASES, read_all(folder), found["cases"], strict=True)
        ]
    for line in lines:
        print(f"\n{line['pattern']} in {line['format']}")
        for what, value in line.items():
            if what not in ("pattern", "format"):
                print(f"  {what:22} {value if not isinstance(value, float) else f'{value:.1%}'}")
    write(chosen.json, legacy_versions=found["versions"], lines=lines)


if __name__ == "__main__":
    if sys.argv[1:2] == [LEGACY]:
        legacy(Path(sys.argv[2]))
    else:
        main()
