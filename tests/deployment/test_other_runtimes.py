"""Runtimes of others beside plain transformers, where they are installed; their drivers with stand-ins everywhere."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.families import tiny_config
from transformers import AutoModelForCausalLM

from secateur.deployment.runtimes.base import Running
from secateur.deployment.runtimes.eager import eager
from secateur.deployment.runtimes.llamacpp import Sequences, llamacpp, llamacpp_q8
from secateur.deployment.runtimes.onnxruntime import onnxruntime
from secateur.deployment.runtimes.vllm import vllm
from secateur.errors import UnsupportedModel


def needs(reason: str | None) -> pytest.MarkDecorator:
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def difference(plain: Running, other: Running, rows: int = 2) -> float:
    """The largest ‖a − b‖ / ‖b‖ of logits: a prompt of 9, three tokens more, and a shorter prompt after that."""
    draw, worst = torch.Generator().manual_seed(0), 0.0
    for prompt in (9, 5):
        for step, length in enumerate((prompt, 1, 1, 1)):
            ids = torch.randint(plain.vocabulary, (rows, length), generator=draw)
            wanted, got = [model.decode(ids) if step else model.prefill(ids) for model in (plain, other)]
            assert got.dtype == torch.float32
            assert got.shape == (rows, plain.vocabulary)
            worst = max(worst, ((got - wanted).norm() / wanted.norm()).item())
    return worst


def test_onnx_runtime_has_float32_only(tiny_llama):  # its logits are in test_onnx.py, where a graph is exported
    with pytest.raises(UnsupportedModel, match=r"in float32 only; torch\.bfloat16 was asked for"):
        onnxruntime.load(tiny_llama, torch.bfloat16)


def saved(folder: Path, family: str, **changes: object) -> Path:
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "fewer heads": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
}


@needs(llamacpp.missing())
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_logits_of_transformers(name, tmp_path):
    family, changes = MODELS[name]
    folder = saved(tmp_path, family, **changes)
    plain, other = eager.load(folder, torch.float32), llamacpp.load(folder, torch.float32)
    assert difference(plain, other) < 1e-5
    assert difference(plain, other, rows=3) < 1e-5


@needs(llamacpp.missing())
def test_llama_cpp_in_fewer_bits(tmp_path):
    folder = saved(tmp_path, "llama")
    plain = eager.load(folder, torch.bfloat16)
    half, eight = llamacpp.load(folder, torch.bfloat16), llamacpp_q8.load(folder, torch.bfloat16)
    assert difference(plain, half) < 2e-2
    assert difference(plain, eight) < 5e-2
    assert half.weight_bytes == pytest.approx(plain.weight_bytes, rel=0.01)  # the vectors are float32 there
    assert eight.weight_bytes == pytest.approx(plain.weight_bytes * 34 / 64, rel=0.02)
    with pytest.raises(UnsupportedModel, match=r"q8_0 needs rows in 32s; .*down_proj\.weight has rows of 72"):
        llamacpp_q8.load(saved(tmp_path / "odd", "llama", intermediate_size=72), torch.bfloat16)


class Library:
    """Stands in for `llama_cpp`: what a batch holds is noted; the logits of a row are 100 times its tokens so far."""

    GGML_TYPE_F32 = LLAMA_FLASH_ATTN_TYPE_DISABLED = 0

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.seen: dict[int, list[int]] = {}
        self.arrays: list[Any] = []
        self.status = 0

    def llama_context_default_params(self) -> SimpleNamespace:
        return SimpleNamespace(type_k=1, type_v=1, flash_attn_type=-1)

    def llama_init_from_model(self, model: object, settings: SimpleNamespace) -> str:
        self.calls.append(settings)
        return "context"

    def llama_get_memory(self, context: str) -> str:
        return "memory"

    def llama_memory_clear(self, memory: str, data: bool) -> None:
        self.seen = {}

    def llama_batch_init(self, count: int, embedding: int, rows: int) -> SimpleNamespace:
        self.arrays = [(kind * count)() for kind in (ctypes.c_int32,) * 3 + (ctypes.c_int8,)]
        token, pos, count_of, logits = (ctypes.cast(a, ctypes.POINTER(a._type_)) for a in self.arrays)
        return SimpleNamespace(
            token=token, pos=pos, n_seq_id=count_of, logits=logits, seq_id=[[-1] for _ in range(count)]
        )

    def llama_batch_free(self, batch: object) -> None:
        self.calls.append("batch freed")

    def llama_decode(self, context: str, batch: SimpleNamespace) -> int:
        self.out = []
        for i in range(batch.n_tokens):
            tokens = self.seen.setdefault(batch.seq_id[i][0], [])
            assert batch.pos[i] == len(tokens)
            assert batch.n_seq_id[i] == 1
            tokens.append(batch.token[i])
            if batch.logits[i]:
                self.out.append([100.0 * sum(tokens), len(tokens)])
        return self.status

    def llama_get_logits(self, context: str) -> Any:
        flat = np.array(self.out, dtype=np.float32).flatten()
        self.held = (ctypes.c_float * len(flat))(*flat)
        return ctypes.cast(self.held, ctypes.POINTER(ctypes.c_float))

    def llama_free(self, context: str) -> None:
        self.calls.append("context freed")

    def llama_model_free(self, model: object) -> None:
        self.calls.append("model freed")


def test_rows_are_sequences_of_llama_cpp():
    library = Library()
    running = Sequences(library, "model", 2, 0, exact=True)
    assert running.prefill(torch.tensor([[1, 2, 3], [4, 5, 6]])).tolist() == [[600, 3], [1500, 3]]
    assert running.decode(torch.tensor([[7], [8]])).tolist() == [[1300, 4], [2300, 4]]
    assert running.prefill(torch.tensor([[1], [2]])).tolist() == [[100, 1], [200, 1]]
    settings = library.calls[0]
    running.room = 600
    running.prefill(torch.tensor([[1], [2]]))
    assert [made.n_ctx for made in library.calls if isinstance(made, SimpleNamespace)] == [512, 2 * 768]
    assert (settings.n_seq_max, settings.type_k, settings.flash_attn_type) == (2, 0, 0)
    assert settings.n_threads == settings.n_threads_batch == torch.get_num_threads()
    assert settings.n_ctx == settings.n_batch == 2 * 256
    assert library.calls.count("batch freed") == 4
    running.room = 8
    running.prefill(torch.tensor([[1, 2]]))
    assert library.calls.count("context freed") == 2  # another batch, another context
    with pytest.raises(UnsupportedModel, match=r"at most 256 sequences apart; a batch of 300"):
        running.prefill(torch.ones(300, 1, dtype=torch.long))
    with pytest.raises(UnsupportedModel, match=r"was made for 256 tokens; 257 are too many"):
        running.decode(torch.ones(1, 255, dtype=torch.long))
    library.status = 1
    with pytest.raises(UnsupportedModel, match=r"could not compute 1 tokens of 1 sequences \(status 1\)"):
        running.decode(torch.tensor([[1]]))
    running.__del__()
    assert library.calls[-2:] == ["context freed", "model freed"]
    running.context = None


@pytest.mark.parametrize("module", ["onnxruntime", "llamacpp", "vllm"])
def test_what_is_missing_is_said(module, monkeypatch):
    runtime = {"onnxruntime": onnxruntime, "llamacpp": llamacpp, "vllm": vllm}[module]
    monkeypatch.setattr("secateur.deployment.runtimes.base.find_spec", lambda name: None)
    assert "not installed: pip install" in (runtime.missing() or "")


def test_vllm_wants_an_accelerator(monkeypatch):
    monkeypatch.setattr("secateur.deployment.runtimes.base.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vllm.missing() == "vllm is installed, but there is no accelerator that torch sees"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert vllm.missing() is None


class Served:
    """Stands in for vLLM's engine: greedy, one token a step, the first half of a prompt in a step of its own."""

    def __init__(self, plain: Any) -> None:
        self.model, self.requests, self.steps = plain.model, {}, 0

    def add_request(self, name: str, prompt: dict[str, list[int]], settings: SimpleNamespace) -> None:
        assert name not in self.requests
        self.requests[name] = SimpleNamespace(prompt=prompt["prompt_token_ids"], settings=settings, own=[], half=False)

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.requests.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    @torch.no_grad()
    def step(self) -> list[SimpleNamespace]:
        self.steps += 1
        outputs = []
        for name, request in list(self.requests.items())[::-1]:
            if not request.half:
                request.half = True
                continue
            logits = self.model(torch.tensor([request.prompt + request.own])).logits[0, -1]
            request.own.append(int(logits.argmax()))
            given = [{i: SimpleNamespace(logprob=float(v)) for i, v in enumerate(logits)}]
            shown = SimpleNamespace(token_ids=list(request.own), logprobs=given if request.settings.logprobs else None)
            outputs.append(SimpleNamespace(request_id=name, outputs=[shown]))
            if request.settings.max_tokens == len(request.own):
                del self.requests[name]
        return outputs


@pytest.fixture
def served(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Any, Any, dict[str, Any]]]:
    """Plain transformers, the vllm runtime over a stand-in for vLLM, and what the stand-in was asked for."""
    plain, asked = eager.load(tiny_llama, torch.float32), {}

    def make(**options: Any) -> SimpleNamespace:
        asked.update(options)
        if asked.get("refuse"):
            raise ValueError("no such architecture")
        return SimpleNamespace(llm_engine=Served(plain))

    module: Any = ModuleType("vllm")
    module.LLM = make
    module.SamplingParams = lambda **given: SimpleNamespace(**({"logprobs": None} | given))
    monkeypatch.setitem(sys.modules, "vllm", module)
    return lambda: (plain, vllm.load(tiny_llama, torch.float32), asked)


def test_vllm_goes_on_with_its_own_tokens(served):
    plain, running, asked = served()
    assert asked["dtype"] == "float32"
    assert asked["enable_prefix_caching"] is False
    assert (running.vocabulary, running.weight_bytes) == (plain.vocabulary, plain.weight_bytes)
    for rows in (2, 1):
        ids = torch.randint(128, (rows, 6))
        wanted, got = plain.prefill(ids), running.prefill(ids)
        for _ in range(3):
            assert got.argmax(-1).tolist() == wanted.argmax(-1).tolist()
            assert got.sum(-1).tolist() == [1] * rows
            token = wanted.argmax(-1, keepdim=True)
            wanted, got = plain.decode(token), running.decode(token)
    assert running.engine.steps == 2 * (2 + 3)
    with pytest.raises(UnsupportedModel, match=r"vLLM goes on with its own greedy tokens \[\d+\]; \[\d+\] were given"):
        running.decode((got.argmax(-1, keepdim=True) + 1) % 128)


def test_vllm_gives_logits_when_asked(served):
    plain, running, asked = served()
    assert (asked["max_logprobs"], asked["logprobs_mode"]) == (-1, "raw_logits")
    ids = torch.randint(128, (3, 5))
    torch.testing.assert_close(running.logits(ids), plain.prefill(ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedModel, match="ended a sequence before all tokens were there"):
        running._next()


def test_vllm_says_what_it_cannot_load(served):
    *_, asked = served()
    asked["refuse"] = True
    with pytest.raises(UnsupportedModel, match=r"vLLM does not load .*: no such architecture"):
        served()
