"""One reader: what is loaded, written and copied is the same set of tensors, and what is besides is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import tiny_model
from support.pruning import prune_opened
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoints.folder import open_checkpoint
from secateur.data.windows import Windows
from secateur.errors import BadCheckpoint, UnsupportedModel
from secateur.models import source
from secateur.models.load import load
from secateur.models.source import check_loaded, ignored_in_words
from secateur.system.memory import MappedFiles


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def prune(text_file, tmp_path):
    def run(folder: Path, **options):
        given = {"method": "wanda", "calibration": str(text_file), "samples": 4, "seq_len": 16, **options}
        return secateur.prune(folder, out=tmp_path / "out", **given)

    return run


def edited(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mixtral"])
def test_a_difference_in_any_tensor_is_seen(model, tmp_path, monkeypatch, request, mapped):
    if not mapped:  # as on a system that does not tell, and in a hub cache
        monkeypatch.setattr(MappedFiles, "at", lambda self, tensor: None)
    dense = request.getfixturevalue(model)
    folder, language_model = shutil.copytree(dense, tmp_path / "model"), load(dense)
    assert check_loaded(open_checkpoint(dense), language_model) == ()
    original = load_file(dense / "model.safetensors")
    assert len(original) > 30
    for name, tensor in original.items():
        save_file({**original, name: tensor.flip(0) + 1}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(BadCheckpoint, match=f"{name} in .*model.safetensors is not what the model was loaded with"):
            check_loaded(open_checkpoint(folder), language_model)


def test_a_mapped_tensor_is_known_by_its_place(tiny_llama):
    checkpoint, language_model = open_checkpoint(tiny_llama), load(tiny_llama)
    files = MappedFiles(checkpoint.folder / shard for shard in checkpoint.shards)
    for name, tensor in language_model.model.state_dict().items():
        if name in checkpoint.places:
            place = checkpoint.places[name]
            assert files.at(tensor) == (tiny_llama / place.shard, place.offset)
    assert files.at(torch.ones(3)) is None
    transposed = language_model.model.get_parameter("model.layers.0.mlp.up_proj.weight").data.T
    assert files.at(transposed) is None


def test_a_source_that_changes_between_loading_and_pruning_is_refused(folder, tmp_path):
    """What is copied is then not what was calibrated on."""
    language_model, older = load(folder), folder / "model.safetensors"
    tensors = load_file(older)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "newer", {"format": "pt"})
    (tmp_path / "newer").replace(older)
    windows = Windows(torch.randint(3, 100, (4, 16)), "random", "none", 0, None)
    with pytest.raises(BadCheckpoint, match=r"embed_tokens\.weight in .* is not what the model was loaded with"):
        prune_opened(open_checkpoint(folder), language_model, windows, tmp_path / "out", method="magnitude")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_experts_that_are_put_together_are_compared(tiny_mixtral, tmp_path):
    language_model = load(tiny_mixtral)
    folder = shutil.copytree(tiny_mixtral, tmp_path / "model")
    name = next(name for name in load_file(folder / "model.safetensors") if ".experts.1." in name)
    edited(folder, lambda tensors: tensors[name].add_(1))
    with pytest.raises(BadCheckpoint, match=name.replace(".", r"\.")):
        check_loaded(open_checkpoint(folder), language_model)


def test_experts_are_compared_where_they_lie(tiny_mixtral, monkeypatch):
    """transformers' way back copies them; 10 GB of that take longer than comparing them."""
    language_model, storages, same = load(tiny_mixtral), [], source.same_bytes
    inside = {tensor.untyped_storage().data_ptr() for tensor in language_model.model.state_dict().values()}

    def noted(one, other):
        storages.append(other.untyped_storage().data_ptr())
        return same(one, other)

    monkeypatch.setattr(source, "same_bytes", noted)
    assert check_loaded(open_checkpoint(tiny_mixtral), language_model) == ()
    assert len(storages) > 20
    assert set(storages) <= inside


def test_a_tensor_that_was_transposed_is_compared(tiny_llama, tmp_path):
    folder, language_model = shutil.copytree(tiny_llama, tmp_path / "model"), load(tiny_llama)
    weight = language_model.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.data = weight.data.T.contiguous().T
    assert check_loaded(open_checkpoint(folder), language_model) == ()
    edited(folder, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][3, 5].neg_())
    with pytest.raises(BadCheckpoint, match=r"layers\.0\.mlp\.up_proj"):
        check_loaded(open_checkpoint(folder), language_model)


def test_of_two_sets_of_weights_the_one_is_read_that_transformers_reads(folder, prune, tmp_path):
    """Old shards with their index lie beside a newer model.safetensors."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "old", max_shard_size="100kB")
    for file in (tmp_path / "old").glob("model*"):
        shutil.copy(file, folder)
    edited(folder, lambda tensors: tensors["model.embed_tokens.weight"].mul_(1.5))
    report = prune(folder)
    assert report.out
    result, source = load_file(report.out / "model.safetensors"), load_file(folder / "model.safetensors")
    assert torch.equal(result["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    assert sorted(file.name for file in report.out.glob("model*")) == ["model.safetensors"]
    assert open_checkpoint(report.out).shards == ("model.safetensors",)


def test_the_config_may_name_the_weights(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert open_checkpoint(folder).shards == ("other.safetensors",)
    assert load(folder).ignored == ()
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "../other.safetensors"}))
    with pytest.raises(BadCheckpoint, match="a file in the same folder was wanted"):
        open_checkpoint(folder)


def test_an_adapter_is_never_merged_in_silence(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match="holds a model and an adapter"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="holds an adapter, not a model"):
        load(folder)


def test_tensors_that_the_model_does_not_load_are_named_and_kept(folder, prune):
    extra = {f"mtp.layers.0.{name}.weight": torch.randn(8, 8) for name in ("q", "k")} | {"score.weight": torch.randn(8)}
    edited(folder, lambda tensors: tensors.update(extra))
    assert load(folder).ignored == ("mtp.layers.0.k.weight", "mtp.layers.0.q.weight", "score.weight")
    report = prune(folder)
    sentence = "Left as it is, since LlamaForCausalLM does not load it: mtp.* (2 tensors), score.* (1 tensor)."
    assert report.note == sentence
    assert json.loads((report.out / "pruning.json").read_text())["note"] == sentence
    written = load_file(report.out / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())


def test_tables_of_old_checkpoints_are_named_for_what_they_are(folder):
    tables = {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(4) for index in range(4)}
    edited(folder, lambda tensors: tensors.update(tables))
    words = ignored_in_words(load(folder))
    assert words.endswith("does not load it: model.layers.*.self_attn.rotary_emb.inv_freq (4 tensors).")


def test_masks_under_names_without_the_prefix_are_named_too(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    masks = {f"h.{index}.attn.masked_bias": torch.tensor(-1e4) for index in range(model.config.num_hidden_layers)}

    def change(tensors):
        for name in [*tensors]:
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors.update(masks)

    words = ignored_in_words(load(edited(tmp_path, change)))
    assert words.endswith(f"does not load it: h.*.attn.masked_bias ({len(masks)} tensors).")


def test_a_matrix_in_another_dtype_is_refused_before_any_work(folder, prune):
    edited(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items() if "up_proj" not in n}))
    with pytest.raises(UnsupportedModel, match=r"mlp\.up_proj\.weight in .* is stored as F32, and most weights as bf"):
        prune(folder)
    assert not (folder.parent / "out").exists()


def test_norms_in_another_dtype_are_let_pass(folder, prune):
    edited(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items() if "norm" not in n}))
    report = prune(folder)
    assert load_file(report.out / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def renamed(prefix: str):
    def change(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return change


def added(**extra):
    return lambda tensors: tensors.update({name.replace("__", "."): tensor for name, tensor in extra.items()})


def pruned_by_torch(tensors):
    weight = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.layers.0.mlp.up_proj.weight_orig"] = weight
    tensors["model.layers.0.mlp.up_proj.weight_mask"] = (weight > 0).float()


def a_reward_model(tensors):
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:1].contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed("_orig_mod."), r"named _orig_mod\.…, as torch\.compile wraps a model\. Strip '_orig_mod\.'"),
        (renamed("module."), r"as DataParallel wraps a model"),
        (renamed("base_model.model."), r"as peft wraps a model"),
        (pruned_by_torch, r"leftovers of torch\.nn\.utils\.prune.*prune\.remove"),
        (added(model__a__lora_A__weight=torch.ones(2)), r"weights of an adapter beside.*merge_and_unload"),
        (added(model__a__qweight=torch.ones(2)), r"Read as gptq: model\.a in .* qweight in F32; I32 or U32"),
        (added(model__a__weight_packed=torch.ones(2)), r"Read as compressed-tensors: .* has no weight_scale"),
        (added(model__a__weight_scale_2=torch.ones(2)), r"Read as nvfp4: model\.a in .* has no weight"),
        (added(model__a__weight_scale_inv=torch.ones(2)), r"quantised weights with their scales"),
        (added(a__scales=torch.ones(2), a__weight=torch.ones(2, dtype=torch.uint32)), r"as mlx: .* of shape \[2\]"),
        (added(model__a__weight=torch.ones(0)), r"is empty, as DeepSpeed's ZeRO-3 saves"),
        (a_reward_model, r"is a classifier or a reward model: it has score\.weight and no lm_head\.weight"),
    ],
)
def test_what_is_no_plain_model_is_called_by_its_name(folder, change, words):
    with pytest.raises((BadCheckpoint, UnsupportedModel), match=words):
        load(edited(folder, change))
