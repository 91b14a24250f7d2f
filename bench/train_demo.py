"""Train the demo model on the standard library's own text; save often, resume where it stopped.

    python bench/train_demo.py --out out/train            # tokenizer, then training; the same command resumes
    python bench/train_demo.py --out out/train --export out/model    # the last step in bf16
    python bench/train_demo.py --out out/mixture8 --experts 8 --active 2     # a mixture, as active as that

The loss on the calibration part is the held-out curve; the evaluation part is never looked at here.
The schedule is warm-up, constant, then linear decay to zero over the last 30 % of the steps.
"""

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from common import options
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from secateur.data import demo

VOCABULARY, CONTEXT, END = 4096, 512, "<|endoftext|>"


def new_model(experts: int, active: int) -> PreTrainedModel:
    """The untrained model: six blocks, grouped-query attention with three heads on each key/value head.

    With `experts`, the `active` ones of a token have together 640 channels, where the feed-forward without has 512.
    """
    shared = {
        "vocab_size": VOCABULARY, "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if not experts:
        return LlamaForCausalLM(LlamaConfig(**shared, intermediate_size=512))
    config = Qwen3MoeConfig(
        **shared, num_experts=experts, num_experts_per_tok=active, moe_intermediate_size=640 // active,
        intermediate_size=512, norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.01,
    )  # fmt: skip
    config.head_dim = 32
    return Qwen3MoeForCausalLM(config)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the training part."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(demo.documents("training"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END, model_max_length=CONTEXT)


def encode(tokenizer: PreTrainedTokenizerFast, part: str, file: Path) -> np.ndarray:
    """One part as a stream of token ids, documents ended by the end-of-text token; cached in `file`."""
    if not file.exists():
        ids = tokenizer(list(demo.documents(part)))["input_ids"]
        np.save(file, np.concatenate([np.array([*document, 0], dtype=np.uint16) for document in ids]))
    return np.load(file)


def rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """The learning rate of a step."""
    decay = round(0.3 * steps)
    return peak * min((step + 1) / warmup, 1.0, (steps - step) / decay)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, ids: np.ndarray, windows: int) -> float:
    """Mean next-token loss in nats over the first windows of the calibration part."""
    model.eval()
    x = torch.from_numpy(ids[: windows * CONTEXT].astype(np.int64)).view(windows, CONTEXT)
    losses = [  # without what balances the router of a mixture
        cross_entropy(model(part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()).item() for part in x.split(16)
    ]
    model.train()
    return sum(losses) / len(losses)


def train(out: Path, model: PreTrainedModel, steps: int, batch: int, peak: float, every: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer/tokenizer.json").exists():
        train_tokenizer().save_pretrained(out / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    text = encode(tokenizer, "training", out / "training.npy")
    held_out = encode(tokenizer, "calibration", out / "calibration.npy")
    print(f"training tokens {len(text):,}  held-out tokens {len(held_out):,}", flush=True)

    print(f"parameters {model.num_parameters():,}", flush=True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
        fused=True,
    )
    first, curve = 0, []
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, curve = state["step"], state["curve"]
    offsets = np.arange(CONTEXT)
    started = time.perf_counter()
    for step in range(first, steps):
        # Windows of one pass tile the stream at a random shift, in random order: every token once a pass.
        per_pass = (len(text) - CONTEXT) // (CONTEXT * batch)
        draw = np.random.default_rng(step // per_pass)
        starts = draw.integers(CONTEXT) + CONTEXT * draw.permutation(per_pass * batch)
        mine = starts[(step % per_pass) * batch :][:batch]
        x = torch.from_numpy(text[mine[:, None] + offsets].astype(np.int64))
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, peak)
        loss = model(x, labels=x, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        done = step + 1
        if done % 20 == 0 and done % every:
            speed = (done - first) * batch * CONTEXT / (time.perf_counter() - started)
            print(f"step {done}/{steps} loss {loss.item():.3f} {speed:.0f} tokens/s", flush=True)
        if done % every == 0 or done == steps:
            value = held_out_loss(model, held_out, 128)
            curve.append({"step": done, "tokens": done * batch * CONTEXT, "held_out": round(value, 4)})
            print(f"step {done}/{steps} held-out {value:.4f} perplexity {math.exp(value):.2f}", flush=True)
            torch.save(
                {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": done, "curve": curve},
                out / "state.pt.part",
            )
            os.replace(out / "state.pt.part", out / "state.pt")
            (out / "curve.json").write_text(json.dumps(curve, indent=1) + "\n")


def export(out: Path, model: PreTrainedModel, folder: Path) -> None:
    """Write the last state as a model folder, in bf16."""
    model.load_state_dict(torch.load(out / "state.pt")["model"])
    model.config.output_router_logits = False
    model.bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(out / "tokenizer").save_pretrained(folder)


if __name__ == "__main__":
    arguments = options(
        __doc__,
        dict(out=Path("out/train"), steps=3200, batch=8, peak=3e-3, threads=2),
        dict(experts=(0, "of a mixture, none for a dense model"), active=2, seed=0),
        dict(every=(100, "steps between held-out loss and save"), export=(Path, "write the last step to this folder")),
    )
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    untrained = new_model(arguments.experts, arguments.active)
    if arguments.export:
        export(arguments.out, untrained, arguments.export)
    else:
        train(arguments.out, untrained, arguments.steps, arguments.batch, arguments.peak, arguments.every)
