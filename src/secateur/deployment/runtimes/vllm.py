"""vLLM on an accelerator, driven through its engine: `add_request`, then one `step` a token.

vLLM samples by itself and goes on with its own greedy token, so what `prefill` and `decode` return
holds a one at that token and zeros elsewhere: its largest value is where the logits' is, which is
all that a clock needs, and nothing is timed that a user would not wait for. `decode` takes that
token back and refuses any other. The logits themselves are asked for by `logits`, which computes a
whole prompt anew and hands every value through Python, far too slowly to time; it is there for the
comparison with plain transformers.

Prefix caching is off, so that a prompt seen before is computed again. Each model takes `SHARE` of
the accelerator's memory, so that the dense model and a few pruned ones take turns in one process.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.deployment.runtimes.base import (
    Running,
    Runtime,
    bytes_read,
    load_model,
    not_installed,
)
from secateur.errors import UnsupportedModel, in_one_line
from secateur.models.load import load_config

SHARE = 0.25
"""Of the accelerator's memory, for the weights and the cache of one model."""


def missing() -> str | None:
    absent = not_installed(["vllm"], "vllm, on a machine with an accelerator")
    if absent or torch.cuda.is_available():
        return absent
    return "vllm is installed, but there is no accelerator that torch sees"


def load(folder: Path, dtype: torch.dtype) -> Running:
    """Raises UnsupportedModel where vLLM does not load the folder."""
    vllm = import_module("vllm")
    vocabulary = load_config(folder).get_text_config().vocab_size
    weight_bytes = bytes_read(load_model(folder, dtype))
    try:
        model = vllm.LLM(
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            gpu_memory_utilization=SHARE,
            max_logprobs=-1,
            logprobs_mode="raw_logits",
        )
    except (ValueError, RuntimeError) as error:
        raise UnsupportedModel(f"vLLM does not load {folder}: {in_one_line(error)}.") from error
    return Engine(model.llm_engine, vllm.SamplingParams, vocabulary, weight_bytes)


class Engine(Running):
    """A vLLM engine, but for what the returned values mean: see the top of this file."""

    def __init__(self, engine: Any, settings: Any, vocabulary: int, weight_bytes: int) -> None:
        super().__init__(vocabulary, weight_bytes)
        self.engine, self.settings, self.asked = engine, settings, 0
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, Any] = {}

    def prefill(self, ids: Tensor) -> Tensor:
        self._ask(ids, max_tokens=self.room + 1)
        return self._next()

    def decode(self, ids: Tensor) -> Tensor:
        own = [tokens[-1] for tokens in self.tokens.values()]
        if ids[:, 0].tolist() != own:
            raise UnsupportedModel(
                f"vLLM goes on with its own greedy tokens {own}; {ids[:, 0].tolist()} were given."
            )
        return self._next()

    def logits(self, ids: Tensor) -> Tensor:
        """The logits after tokens int64 `[batch, length]`, float32 `[batch, vocabulary]`. Slow."""
        self._ask(ids, max_tokens=1, logprobs=-1)
        self._next()
        logits = torch.full((len(ids), self.vocabulary), float("nan"))  # NaN fails a comparison
        for row, given in enumerate(self.logprobs.values()):
            numbers = torch.tensor([number for number in given if number < self.vocabulary])
            logits[row, numbers] = torch.tensor([given[int(number)].logprob for number in numbers])
        return logits

    def _ask(self, ids: Tensor, **settings: int) -> None:
        """Drop what the engine was at and give it a prompt for each row."""
        self.engine.abort_request(list(self.tokens))
        self.tokens, self.logprobs = {}, {}
        for row in ids.tolist():
            name, self.asked = str(self.asked), self.asked + 1
            self.tokens[name] = []
            parameters = self.settings(
                temperature=0.0, ignore_eos=True, detokenize=False, **settings
            )
            self.engine.add_request(name, {"prompt_token_ids": row}, parameters)

    def _next(self) -> Tensor:
        """Step until every row has one token more; one-hot float32 `[batch, vocabulary]`."""
        wanted = {name: len(tokens) + 1 for name, tokens in self.tokens.items()}
        while any(len(self.tokens[name]) < count for name, count in wanted.items()):
            if not self.engine.has_unfinished_requests():
                raise UnsupportedModel(
                    "vLLM ended a sequence before all tokens were there: ask for fewer."
                )
            for output in self.engine.step():
                if output.request_id in self.tokens:
                    self.tokens[output.request_id] = list(output.outputs[0].token_ids)
                    if output.outputs[0].logprobs:
                        self.logprobs[output.request_id] = output.outputs[0].logprobs[-1]
        self.logprobs = {name: self.logprobs[name] for name in self.tokens if name in self.logprobs}
        chosen = torch.tensor([tokens[-1] for tokens in self.tokens.values()])
        return torch.nn.functional.one_hot(chosen, self.vocabulary).float()


vllm = Runtime(missing, load, packages=("vllm",))
