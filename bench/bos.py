"""What BOS in each window is worth to a model that was trained with it: calibration and evaluation, with and without.

    python bench/bos.py --json bench/results/bos.json

A Llama of a million parameters is trained on TinyStories with the tokenizer of stories260K, BOS at the start of every
window and nowhere else; a second one begins with an embedding of BOS a hundred times as large, so that this position is
the same in every layer and heads may rest on it, as those of large models do. Then each is pruned to 50 %, calibrated
on windows as the tokenizer cuts them (`stream`) and on windows that begin with BOS (`each-window`), and every result is
judged on both kinds of window, and on some without any BOS.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import options, write
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import secateur

WAYS = ("stream", "each-window")
JUDGED = (*WAYS, "never")
"""`stream` also asks for the BOS that begins a story, which this model never saw inside a window; `never` does not."""
METHODS = ("wanda", "sparsegpt")


def stream(tokenizer: Any, file: Path) -> Tensor:
    """The stories of a file as one stream, the end-of-text token after each, without BOS."""
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for one in ids for token in [*one, tokenizer.eos_token_id]])


def train(given: Any, tokenizer: Any, tokens: Tensor, sink: float) -> LlamaForCausalLM:
    """A model trained on random windows of the stream behind BOS, whose embedding begins `sink` times as large."""
    torch.manual_seed(given.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=given.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=given.length,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config).train()
    model.get_input_embeddings().weight.data[tokenizer.bos_token_id] *= sink
    optimiser = torch.optim.AdamW(model.parameters(), lr=given.rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, given.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, 1 - 0.9 * step / given.steps)
    )
    began = time.perf_counter()
    for step in range(given.steps):
        starts = torch.randint(0, len(tokens) - given.length, (given.batch,)).tolist()
        windows = torch.stack([tokens[start : start + given.length - 1] for start in starts])
        ids = torch.cat([torch.full_like(windows[:, :1], tokenizer.bos_token_id), windows], 1)
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{step} {loss.item():.3f} {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return model.eval()


def judged(model: Path, dense: Path, given: Any, evaluation: Path) -> dict[str, Any]:
    """A model on every kind of window, beside the dense one."""
    results = {}
    for way in JUDGED:
        found = secateur.evaluate(
            model, dense=dense, evaluation=str(evaluation), seq_len=given.length, windows=given.windows, bos=way
        )
        results[way] = {
            "perplexity": found.perplexity, "delta": found.delta, "delta_interval": found.delta_interval,
            "kl": found.kl, "bits_per_byte": found.bits_per_byte, "note": found.note,
        }  # fmt: skip
    return results


def pruned(trained: LlamaForCausalLM, tokenizer: Any, given: Any, files: tuple[Path, Path]) -> list[dict[str, Any]]:
    """The rows of a model: dense, then by method and calibration, each judged on every kind of window."""
    stories, evaluation = files
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        trained.save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        rows = [{"method": "dense", "calibration": None, "judged": judged(dense, dense, given, evaluation)}]
        for method in METHODS:
            for way in WAYS:
                out = Path(folder) / f"{method}-{way}"
                text: Any = dict(calibration=str(stories), samples=given.samples, seq_len=given.length, bos=way)
                secateur.prune(dense, out=out, method=method, pattern="50%", **text)
                rows.append({"method": method, "calibration": way, "judged": judged(out, dense, given, evaluation)})
    return rows


def main() -> None:
    given = options(
        __doc__,
        dict(steps=600, batch=16, length=256, hidden=128, layers=5, rate=3e-3, seed=0),
        dict(samples=64, windows=128, sinks="1,100", data=Path("../shared/data"), json=Path),
    )
    tokenizer = AutoTokenizer.from_pretrained(given.data / "models" / "stories260K")
    stories, evaluation = (given.data / "tinystories" / name for name in ("v2_train_head.jsonl", "valid_head.jsonl"))
    tokens, models = stream(tokenizer, stories), []
    for sink in given.sinks.split(","):
        began = time.perf_counter()
        trained = train(given, tokenizer, tokens, float(sink))
        facts = {"sink": float(sink), "parameters": trained.num_parameters(), "seconds": time.perf_counter() - began}
        rows = pruned(trained, tokenizer, given, (stories, evaluation))
        models.append({**facts, "rows": rows})
        for row in rows:
            figures = "  ".join(f"{way} {row['judged'][way]['perplexity']:.3f}" for way in JUDGED)
            calibrated = f"{row['method']:<10} calibrated on {row['calibration'] or '-':<12}"
            print(f"BOS × {sink}: {calibrated} judged on {figures}", flush=True)
        asked = {name: value for name, value in vars(given).items() if name not in ("data", "json")}
        write(given.json, command=sys.argv, options=asked, models=models)


if __name__ == "__main__":
    main()
