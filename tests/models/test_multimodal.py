"""Models that see or hear as well as read: the language model is found, pruned, and everything else stays as it is.

The tower of every model here has more weights than its language model, which is thus not "the largest list".
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import tiny_model
from support.multimodal import MULTIMODAL, tiny_multimodal
from support.pruning import prune_opened
from support.texts import byte_tokenizer
from transformers import AutoModelForMultimodalLM

import secateur
from secateur.checkpoints.folder import open_checkpoint
from secateur.data.windows import Windows
from secateur.deployment.inspect import inspect
from secateur.errors import UnsupportedModel
from secateur.models.load import find_stack, load, load_config, replayable
from secateur.models.parts import architecture_of, language_part, other_parts
from secateur.pruning.in_memory import prune_model
from secateur.pruning.structured.feasibility import Feasibility

REFUSED = {
    "ernie4_5_vl_moe": "transformers cannot put single weights of Ernie4_5_VLMoeForConditionalGeneration back",
    "llama4": r"Only 27\.4% of the block weights of Llama4ForConditionalGeneration are prunable matrices",
    "mllama": "called its 4 blocks 3 times for text; once each is wanted. What only images or sound reach",
    "paligemma": "Encoders, and models that read a prompt in both directions, have no perplexity",
}
pytestmark = pytest.mark.filterwarnings("ignore")  # each family warns about itself in its own way


def windows() -> Windows:
    ids = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(1))
    return Windows(ids, "random", "none", 1, None)


def test_there_are_enough_families():
    assert len(set(MULTIMODAL) - set(REFUSED)) == 44


@pytest.mark.parametrize("family", sorted(set(MULTIMODAL) - set(REFUSED)))
def test_zeros_go_into_the_language_model_and_nowhere_else(family: str, tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny_multimodal(family)
    model.save_pretrained(source)
    text = model.get_submodule(language_part(model))
    assert 2 * sum(p.numel() for p in text.parameters()) < sum(p.numel() for p in model.parameters())

    report = prune_opened(open_checkpoint(source), load(source), windows(), out, method="wanda", pattern="2:4")
    assert report.coverage >= 0.95
    assert all(site.site.startswith(f"{language_part(model)}.layers.") for site in report.sites)
    assert all(site.sparsity == 0.5 for site in report.sites)
    assert "Left as it is, since no text goes through it: " in report.note

    assert secateur.forecast(source, method="wanda", samples=8, seq_len=32).sites == len(report.sites)

    found, zeroed = inspect(out), set()
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert list(before) == list(after)
    for name, tensor in before.items():
        if not torch.equal(tensor, after[name]):
            zeroed.add(name)
    assert zeroed == {tensor.name for tensor in found.tensors}
    assert all("2:4" in tensor.patterns for tensor in found.tensors)

    in_memory, tokens = load(source), windows().ids[:2]
    prune_model(in_memory, windows(), method="wanda", pattern="2:4")
    with torch.no_grad():
        stock = AutoModelForMultimodalLM.from_pretrained(out, dtype="auto").eval()
        assert type(stock) is type(in_memory.model)
        expected = in_memory.model(tokens, use_cache=False).logits
        assert torch.equal(stock(tokens, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", ["chameleon", "fuyu"])
def test_pictures_that_are_words_or_patches_stay_as_they_are(family: str, tmp_path: Path):
    """Chameleon's configuration has none for its text, and Fuyu has no tower that outweighs it."""
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny_multimodal(family)
    model.save_pretrained(source)
    report = prune_opened(open_checkpoint(source), load(source), windows(), out, method="magnitude", pattern="50%")
    assert report.coverage >= 0.95
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {tensor.name for tensor in inspect(out).tensors}
    assert changed
    assert not any("vqmodel" in name or "vision" in name for name in changed)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_the_rules_do_not_fit_is_refused(family: str, tmp_path: Path):
    tiny_multimodal(family).save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedModel, match=REFUSED[family]):
        prune_opened(
            open_checkpoint(tmp_path / "source"), load(tmp_path / "source"), windows(), tmp_path / "out",
            method="wanda", pattern="2:4",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_model_of_text_alone_has_no_other_parts():
    model = tiny_model("gpt2")
    assert (language_part(model), other_parts(model), find_stack(model)) == ("", {}, "transformer.h")


def test_the_parts_are_counted_in_tensors():
    model = tiny_multimodal("llava")
    names = [*model.state_dict()]
    assert language_part(model) == "model.language_model"
    assert other_parts(model) == {
        "multi_modal_projector": sum("projector" in name for name in names),
        "vision_tower": sum("vision_tower" in name for name in names),
    }


def test_a_language_model_that_is_not_there_is_missed():
    model = tiny_multimodal("llava")
    model.config.text_config = type(model.config.text_config)(**model.config.text_config.to_dict())
    with pytest.raises(UnsupportedModel, match=r"configuration for text \(LlamaConfig\), and no module that is built"):
        replayable(model)


def test_architectures_say_which_of_two_classes_a_checkpoint_is(tmp_path):
    tiny_multimodal("qwen3_5").save_pretrained(tmp_path)
    assert architecture_of(load_config(tmp_path)) == "Qwen3_5ForConditionalGeneration"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3_5ForCausalLM"]}))
    assert architecture_of(load_config(tmp_path)) == "Qwen3_5ForCausalLM"


@pytest.fixture(scope="module", params=["gemma3", "qwen2_5_vl", "llava"])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("multimodal") / request.param
    tiny_multimodal(request.param).bfloat16().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pattern", ["25% of channels", "1 block", "to 97% of parameters"])
def test_structures_are_taken_out_of_the_text(folder, text_file, tmp_path, pattern):
    """A fresh process gets the logits of text; all else is what it was, byte for byte."""
    given = {"calibration": str(text_file), "samples": 4, "seq_len": 16}
    report = secateur.prune(folder, out=tmp_path / "out", pattern=pattern, **given)
    assert report.parameters
    assert report.parameters[1] < report.parameters[0]
    assert "Left as it is, since no text goes through it: " in report.note
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    parts = other_parts(load(folder).model)
    others = {name for name in before if any(f"{part}." in name for part in parts)}
    assert len(others) == sum(parts.values())
    assert all(torch.equal(before[name], after[name]) for name in others)
    smaller, dense = load_config(tmp_path / "out"), load_config(folder)
    assert smaller.architectures == dense.architectures
    assert smaller.vision_config.to_dict() == dense.vision_config.to_dict()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_a_picture_goes_through_the_smaller_model(family, tmp_path):
    """As through the dense one where the block that is gone does nothing."""
    dense = tiny_multimodal(family).eval()
    dense.save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source"), load(tmp_path / "source")
    report = prune_opened(*source, windows(), tmp_path / "out", method="influence", pattern="1 block")
    block = replayable(dense).blocks[int(report.removed["blocks"])]
    block.register_forward_hook(lambda module, args, kwargs, output: passed_by(args, kwargs, output), with_kwargs=True)
    picture: dict[str, Any] = {"pixel_values": torch.randn(1, 3, 32, 32)}
    if family == "qwen2_5_vl":
        picture = {"pixel_values": torch.randn(16, 3 * 2 * 16 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    ids = torch.tensor([[5, 6, *[dense.config.image_token_id] * 4, 7, 8]])
    smaller = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").eval()
    one, other = (model(input_ids=ids, use_cache=False, **picture).logits for model in (smaller, dense))
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_flat_configuration_gets_a_part_for_the_text(tmp_path):
    """Qwen2.5-VL has its fields for the text beside the others on the hub; transformers reads both."""
    tiny_multimodal("qwen2_5_vl").save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    text = config.pop("text_config")
    file.write_text(json.dumps({**text, **config}))
    source = open_checkpoint(tmp_path / "source"), load(tmp_path / "source")
    prune_opened(*source, windows(), tmp_path / "out", method="energy", pattern="25% of channels")
    smaller = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").config
    assert smaller.text_config.intermediate_size == source[1].text_config.intermediate_size * 3 // 4
    assert smaller.vision_config.to_dict() == source[1].model.config.vision_config.to_dict()


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_names_on_disk_may_be_those_of_the_modules(family, tmp_path):
    model = tiny_multimodal(family)
    model.save_pretrained(tmp_path / "source")
    once = {tensor.data_ptr(): name for name, tensor in reversed(model.state_dict().items())}  # a head may be tied
    state = {name: model.state_dict()[name].contiguous() for name in once.values()}
    save_file(state, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    source = open_checkpoint(tmp_path / "source"), load(tmp_path / "source")
    prune_opened(*source, windows(), tmp_path / "out", method="influence", pattern="1 block")
    written = open_checkpoint(tmp_path / "out").places
    assert not any(".layers.3." in name for name in written if "language_model" in name)
    assert set(written) <= set(source[0].places)


def test_blocks_behind_which_pictures_enter_stay():
    """DeepStack counts blocks: were one of the first gone, a picture would enter elsewhere."""
    feasible = Feasibility(replayable(tiny_multimodal("qwen3_vl")), torch.device("cpu"))
    assert [feasible.holds([index]) for index in range(4)] == [False, False, False, True]


def test_experts_that_only_pictures_reach_are_not_judged_by_text(tmp_path):
    tiny_multimodal("ernie4_5_vl_moe").save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source"), load(tmp_path / "source")
    with pytest.raises(
        UnsupportedModel, match=r"No token of the text reaches .*vision_moe.experts, .*or use a pattern"
    ):
        prune_opened(*source, windows(), tmp_path / "out", method="reap", pattern="25% of experts")


def passed_by(args: Any, kwargs: Any, output: Any) -> Any:
    """What a block gives that does nothing."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def test_every_room_works_on_the_text(folder, text_file, tmp_path):
    text = str(text_file)
    short: Any = {"seq_len": 16}
    given = {"calibration": text, "samples": 4, **short}
    foreseen = secateur.forecast(folder, method="wanda", samples=4, **short)
    plan = secateur.plan(folder, out=tmp_path / "plan.json", allocate="error", **given)
    report = secateur.prune(folder, out=tmp_path / "out", method="wanda", pattern="2:4", **given)
    assert report.out
    assert foreseen.sites == len(report.sites) == len(plan)
    evaluation = secateur.evaluate(report.out, dense=folder, evaluation=text, windows=4, **short)
    assert evaluation.kl
    assert evaluation.kl > 0
    assert secateur.validate(report.out, runtime="packed").kept
    secateur.export(report.out, out=tmp_path / "packed", to="packed")
    secateur.export(tmp_path / "packed", out=tmp_path / "dense", to="dense")
    written = load_file(report.out / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())
    secateur.load_packed(tmp_path / "packed", measure=False)
    for to in ("gguf", "tensorrt-llm"):
        with pytest.raises(UnsupportedModel, match="ForConditionalGeneration"):
            secateur.export(report.out, out=tmp_path / to, to=to)
        assert not (tmp_path / to).exists()
    secateur.recover(
        report.out, dense=folder, way="masked", text=text, steps=2, batch_size=2, out=tmp_path / "r", **short
    )
    shutil.rmtree(tmp_path / "r")
