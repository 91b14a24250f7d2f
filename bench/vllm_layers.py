"""Which of the grids that Secateur writes vLLM takes, by vLLM's own code, on a machine without an accelerator.

    python bench/vllm_layers.py --json bench/results/vllm-layers.json

The demo model is pruned to 2:4 with each kind of `--values` and exported to compressed-tensors. vLLM then reads
config.json, chooses a scheme and a kernel for the four linear layers of a block (queries, keys and values are one, gate
and up another), makes their parameters and loads the tensors of the files into them with its own loaders; their bytes
are compared with those of the files. It believes to be on a GPU of each of CAPABILITIES: the wheel is fetched for its
Python code alone, so questions to its compiled kernels ("do you know fp8?") are answered with yes, and no product is
computed. Needs about 1 GB in --folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from common import HIDDEN, fetched, options, write
from torch import Tensor

VERSION = "0.33.0"
BESIDE = [
    "apache-tvm-ffi==0.1.11", "cachetools==8.0.2", "cbor2==6.3.0", "compressed-tensors==0.17.0", "einops==0.8.2",
    "fastapi==0.136.3", "humming-kernels==0.1.19", "llguidance==1.7.6", "loguru==0.7.3", "msgspec==0.23.0",
    "openai==3.57.0", "oss-harmony==0.0.11", "partial-json-parser==0.2.1.1.post7", "pillow==13.0.0",
    "prometheus-client==0.26.0", "py-cpuinfo==9.0.0", "pybase64==1.5.1", "pyzmq==27.3.0", "sniffio==1.3.1",
    "starlette==1.10.0", "uvloop==0.23.0", "xgrammar==0.2.9",
]  # fmt: skip
"""What the part of vLLM that is used here imports and is not installed with Secateur."""
CAPABILITIES = {"Turing": (7, 5), "Ampere": (8, 0), "Hopper": (9, 0), "Blackwell": (10, 0)}
VALUES = (
    "int8", "int8 of group 64", "int4 of group 64", "int4 of group 32", "int4 of row", "int4 asymmetric of group 64",
    "int3 of group 64", "int2 of group 64", "fp8", "nvfp4", "mxfp4",
)  # fmt: skip
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SHARDS: dict[str, Any] = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
LAYERS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


# What runs in a process with vLLM: no Secateur in here.


def on_gpu(capability: tuple[int, int]) -> None:
    """Have vLLM, which is imported already, believe that it runs on a GPU."""
    for name in ("_C", "_C_stable_libtorch", "_moe_C"):
        sys.modules.setdefault(f"vllm.{name}", ModuleType(f"vllm.{name}"))
    platforms = import_module("vllm.platforms")
    base = import_module("vllm.platforms.cuda").NvmlCudaPlatform
    version = import_module("vllm.platforms.interface").DeviceCapability

    class Pretended(base):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return version(*capability)

        @classmethod
        def has_device_capability(cls, wanted: Any, device_id: int = 0) -> bool:
            return capability >= (wanted if isinstance(wanted, tuple) else divmod(wanted, 10))

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return f"compute capability {capability}"

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    platforms.current_platform.__class__ = Pretended  # modules hold the object by name
    for name in ("vllm.utils.import_utils", "vllm.model_executor.kernels.linear.mixed_precision.humming"):
        module: Any = import_module(name)
        module.has_humming = lambda: True  # which is there, without what it compiles with
    kernels = import_module("vllm._custom_ops")
    for name in dir(kernels):
        if "_supports_" in name:
            setattr(kernels, name, lambda *given, **named: True)


def layer_of(leaf: str, config: dict[str, Any], quantised: Any) -> Any:
    """The linear layer that vLLM makes for one of LAYERS of a Llama, in the first block."""
    linear = import_module("vllm.model_executor.layers.linear")
    hidden, ffn, heads = (config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = config.get("head_dim") or hidden // heads
    made = dict(bias=False, quant_config=quantised, params_dtype=torch.bfloat16, prefix=f"model.layers.0.{leaf}")
    match leaf.rpartition(".")[2]:
        case "qkv_proj":
            return linear.QKVParallelLinear(hidden, head, heads, config["num_key_value_heads"], **made)
        case "gate_up_proj":
            return linear.MergedColumnParallelLinear(hidden, [ffn, ffn], **made)
        case "o_proj":
            return linear.RowParallelLinear(heads * head, hidden, **made)
        case _:
            return linear.RowParallelLinear(ffn, hidden, **made)


def loaded(layer: Any, leaf: str, tensors: dict[str, Tensor]) -> None:
    """Load what the files hold for a layer by its own loaders. Raises AssertionError where bytes or names differ."""
    start, _, name = f"model.layers.0.{leaf}".rpartition(".")
    parameters, sources = dict(layer.named_parameters()), JOINED.get(name, (name,))
    joined: dict[str, list[Tensor]] = {part: [] for part in parameters}
    for source in sources:
        for full in (full for full in tensors if full.startswith(f"{start}.{source}.")):
            part = full.removeprefix(f"{start}.{source}.")
            shard = [SHARDS[source]] if source in SHARDS else []
            parameters[part].weight_loader(parameters[part], tensors[full], *shard)
            joined[part].append(tensors[full])
    for part, parts in joined.items():
        if part == "weight_shape":  # the last one that was loaded
            continue
        assert len(parts) == len(sources), f"{leaf}: {part} is not in the files"
        whole = torch.cat([one.flatten() for one in parts])
        held = parameters[part].data.flatten()  # scales of fp8 are held wider than they are stored
        assert torch.equal(held.float(), whole.to(held.dtype).float()), f"{leaf}: {part} differs"


def tried(folder: Path) -> dict[str, Any]:
    """By layer of a block its scheme and kernel, or why there is none."""
    load_file = import_module("safetensors.torch").load_file
    kind = import_module("vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors")
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}
    found: dict[str, Any] = {}
    for leaf in LAYERS:
        quantised = kind.CompressedTensorsConfig.from_config(config["quantization_config"])
        quantised.packed_modules_mapping = {name: list(of) for name, of in JOINED.items()}
        try:
            layer = layer_of(leaf, config, quantised)
            loaded(layer, leaf, tensors)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            found[leaf] = {"refused": str(error)}
            continue
        kernel = getattr(layer.scheme, "kernel", None)
        found[leaf] = {"scheme": type(layer.scheme).__name__, "kernel": type(kernel).__name__ if kernel else None}
    return found


def work(text: str) -> None:
    """Try the folders that JSON names on one GPU; print what was found as one line of JSON."""
    given = json.loads(text)
    config = import_module("vllm.config")
    parallel = import_module("vllm.distributed")
    import_module("vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors")
    settings = config.VllmConfig()
    with config.set_current_vllm_config(settings):
        parallel.init_distributed_environment(1, 0, f"file://{given['store']}", 0, "gloo")
        parallel.initialize_model_parallel()
        settings.model_config = SimpleNamespace(dtype=torch.bfloat16, quantization_config=None)
        on_gpu(tuple(given["capability"]))
        found = {name: tried(Path(folder)) for name, folder in given["folders"].items()}
    print("\n" + json.dumps(found))


# What runs here.


def python_of_vllm(folder: Path) -> Path:
    """Where the Python code of vLLM lies, fetched unless it is there."""
    place = folder / f"vllm-{VERSION}"
    if not place.is_dir():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, f"vllm=={VERSION}"]
        subprocess.run(pip, check=True)
        (wheel,) = folder.glob(f"vllm-{VERSION}-*.whl")
        partial = folder / "vllm.partial"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial, [name for name in archive.namelist() if not name.endswith(".so")])
        wheel.unlink()
        partial.rename(place)
    return place


def exported(values: str, out: Path) -> Path:
    """The demo model, pruned to 2:4 with such values and exported; made once."""
    name = values.replace(" ", "-")
    pruned, folder = out / "pruned" / name, out / "exported" / name
    if not folder.is_dir():
        secateur = [sys.executable, "-m", "secateur"]
        chosen = ["--method", "wanda", "--pattern", "2:4", "--values", f"{values} by nearest", "--samples", "8"]
        subprocess.run([*secateur, "prune", *chosen, "--out", pruned], check=True, capture_output=True)
        command = [*secateur, "export", pruned, "--to", "compressed-tensors", "--out", folder]
        subprocess.run(command, check=True, capture_output=True)
    return folder.resolve()


def in_words(found: dict[str, dict[str, Any]]) -> str:
    """What a grid comes to on a GPU: the kernels of its layers, or "refused"."""
    kernels = {one.get("kernel") or one.get("scheme") or "refused" for one in found.values()}
    return " and ".join(sorted(name.removesuffix("LinearKernel").replace("CompressedTensors", "") for name in kernels))


def main() -> None:
    given = options(
        __doc__, dict(out=Path("out/vllm-layers"), folder=Path("out/quantisers"), json=Path, work=(str, HIDDEN))
    )
    if given.work:  # in a process of its own
        work(given.work)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    places = python_of_vllm(given.folder), fetched(given.folder / f"beside-vllm-{VERSION}", BESIDE)
    folders = {values: str(exported(values, given.out)) for values in VALUES}
    variables = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONPATH": os.pathsep.join(str(one.resolve()) for one in places),
    }
    found: dict[str, Any] = {}
    for name, capability in CAPABILITIES.items():
        store = given.out.resolve() / "store"
        store.unlink(missing_ok=True)
        job = json.dumps({"capability": capability, "folders": folders, "store": str(store)})
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--work", job]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"vLLM {VERSION} does not run here: {done.stderr.strip()[-600:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    print("| values | " + " | ".join(found) + " |")
    print("| --- |" + " --- |" * len(found))
    for values in VALUES:
        print(f"| {values} | " + " | ".join(in_words(of[values]) for of in found.values()) + " |")
    write(given.json, command=["bench/vllm_layers.py"], vllm=VERSION, beside=BESIDE, found=found)


if __name__ == "__main__":
    main()
