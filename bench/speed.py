"""Is a smaller model faster? Prefill and one-token decode in plain transformers and in ONNX Runtime, as ratios.

    pip install onnx onnxscript onnxruntime
    python bench/speed.py --json bench/results/speed.json

The model is a random Llama, by default of 130 million parameters, since only shapes matter for speed; `--model` takes
a checkpoint folder. It is shrunk by `secateur`, and dense and smaller models then run in turn, so that whatever
else the machine does falls on all of them. The median of the paired ratios is what counts; the ratio of parameters
stands beside it. Each smaller model is what the stock loader makes of the folder.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from common import options, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from secateur.checkpoints.folder import open_checkpoint
from secateur.data.windows import Windows
from secateur.models.load import load
from secateur.pruning.check import find_recipe
from secateur.pruning.opening import Opened
from secateur.pruning.prune import prune_checkpoint
from secateur.system.devices import find_resources
from secateur.system.progress import Progress
from secateur.system.settings import Compute, Destination, Recipe, Trust

PROMPT = 256


def random_llama(folder: Path, hidden: int, ffn: int, blocks: int) -> None:
    """Save a random float32 Llama with heads of 64, four query heads to a key-value head, and 8192 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=blocks, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256, head_dim=64, vocab_size=8192, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


class Prefill(nn.Module):
    """Logits of the last of `PROMPT` tokens, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False, logits_to_keep=1).logits


class Decode(nn.Module):
    """Logits of one token after a cache of `PROMPT` tokens, whose keys and values are inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        cache = DynamicCache()
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key, value, index)
        position = torch.full((1, 1), PROMPT, device=ids.device)
        return self.model(ids, past_key_values=cache, position_ids=position, use_cache=True).logits


def workloads(model: Any) -> dict[str, tuple[nn.Module, tuple]]:
    """What is timed: a module and its inputs."""
    config = model.config
    shape = (1, config.num_key_value_heads, PROMPT, config.head_dim)
    draw = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, config.vocab_size, (1, PROMPT), generator=draw)
    past = [[torch.randn(shape, generator=draw) for _ in range(config.num_hidden_layers)] for _ in range(2)]
    return {"prefill": (Prefill(model), (prompt,)), "decode": (Decode(model), (prompt[:, :1], *past))}


def runners(folder: Path, onnx: Path | None) -> dict[str, Callable[[], object]]:
    """One call for each runtime and workload."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, Callable[[], object]] = {}
    for name, (module, inputs) in workloads(model).items():
        found[f"transformers {name}"] = lambda module=module, inputs=inputs: module(*inputs)
        if onnx is None:
            continue
        import onnxruntime  # pyright: ignore[reportMissingImports]

        file = onnx / f"{folder.name}-{name}.onnx"
        torch.onnx.export(module, inputs, file, dynamo=True, external_data=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        flat = [tensor for part in inputs for tensor in (part if isinstance(part, list) else [part])]
        feed = {held.name: tensor.numpy() for held, tensor in zip(session.get_inputs(), flat, strict=True)}
        wanted, (got, *_) = module(*inputs), session.run(None, feed)
        difference = (wanted - torch.from_numpy(got)).abs().max() / wanted.abs().max()
        assert difference < 1e-3, f"ONNX Runtime computes something else: {difference}"
        found[f"onnxruntime {name}"] = lambda session=session, feed=feed: session.run(None, feed)
    return found


def paired(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """The seconds of every call, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            started = perf_counter()
            call()
            seconds[name].append(perf_counter() - started)
    return seconds


@torch.no_grad()
def main() -> None:
    chosen = options(
        __doc__,
        dict(model=(Path, "a checkpoint folder; default: a random Llama")),
        dict(hidden=1024, ffn=4096, blocks=8),
        dict(patterns="25% of channels,50% of channels,25% of blocks", repeats=15, no_onnx=False, json=Path),
    )
    lines = []
    with TemporaryDirectory() as temporary:
        place = Path(temporary)
        source = chosen.model or place / "dense"
        if chosen.model is None:
            random_llama(source, chosen.hidden, chosen.ffn, chosen.blocks)
        folders = {"dense": source}
        for number, pattern in enumerate(chosen.patterns.split(",")):
            folders[pattern] = place / f"smaller-{number}"
            ids = torch.randint(3, 1000, (2, 64), generator=torch.Generator().manual_seed(0))
            prune_checkpoint(
                Opened(open_checkpoint(source), load(source), Windows(ids, "random", "none", 0, None)),
                find_recipe(Recipe(method="influence" if "blocks" in pattern else "random", pattern=pattern)),
                find_resources(Compute()),
                Destination(out=folders[pattern]),
                Trust(),
                Progress(),
            )
        calls = {
            (name, what): call
            for name, folder in folders.items()
            for what, call in runners(folder, None if chosen.no_onnx else place).items()
        }
        parameters = {n: AutoModelForCausalLM.from_pretrained(f).num_parameters() for n, f in folders.items()}
        size = {name: open_checkpoint(folder).bytes for name, folder in folders.items()}
        for what in dict.fromkeys(what for _, what in calls):
            seconds = paired({name: call for (name, kind), call in calls.items() if kind == what}, chosen.repeats)
            for name in folders:
                ratios = [d / s for d, s in zip(seconds["dense"], seconds[name], strict=True)]
                lines.append(
                    {
                        "what": what,
                        "pattern": name,
                        "milliseconds": 1e3 * statistics.median(seconds[name]),
                        "speedup": statistics.median(ratios),
                        "speedup_quartiles": statistics.quantiles(ratios, n=4)[::2],
                        "parameters": parameters[name] / parameters["dense"],
                        "bytes": size[name] / size["dense"],
                    }
                )
    print(f"{'':22s}{'':22s}{'ms':>9s}{'speed-up':>10s}{'quartiles':>14s}{'parameters':>12s}{'on disk':>9s}")
    for line in lines:
        low, high = line["speedup_quartiles"]
        print(
            f"{line['what']:22s}{line['pattern']:22s}{line['milliseconds']:9.1f}{line['speedup']:10.2f}"
            f"{low:8.2f}-{high:.2f}{line['parameters']:12.1%}{line['bytes']:9.1%}"
        )
    write(chosen.json, options=vars(chosen), lines=lines)


if __name__ == "__main__":
    main()
