"""Which files of a source a result has: all that belong to the model, and none that was made of other weights."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import secateur
from secateur.errors import BadCheckpoint

BELONGING = (
    "README.md", "LICENSE", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
    "generation_config.json", "additional_chat_templates/tools.jinja", "1_Pooling/config.json",
    "2_Dense/model.safetensors", "2_Dense/config.json", "modules.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
STALE = (
    "a-Q4.gguf", "model.onnx", "model.onnx_data",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "params.json", "optimizer.pt",
    "model.fp16.safetensors", "model.fp16.safetensors.index.json", "onnx/model.onnx", "original/params.json",
)  # fmt: skip
MODULES = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../sentinel"}, {"path": 7}, "x"]


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    for name in {*BELONGING, *STALE} - {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "generation_config.json").write_text("{}")
    (folder / "modules.json").write_text(json.dumps(MODULES))
    return folder


@pytest.fixture
def prune(text_file, tmp_path):
    def prune(folder: Path, **options):
        given = {"method": "magnitude", "calibration": str(text_file), "samples": 4, "seq_len": 16, **options}
        return secateur.prune(folder, out=tmp_path / "out", **given)

    return prune


@pytest.mark.parametrize(
    "pattern", [{}, {"method": "random", "pattern": "25% of channels"}], ids=["zeros", "structure"]
)
def test_what_belongs_to_the_model_is_copied_and_other_weights_are_not(folder, prune, pattern):
    report = prune(folder, **pattern)
    names = {path.relative_to(report.out).as_posix() for path in report.out.rglob("*") if path.is_file()}
    assert names == {*BELONGING, "config.json", "model.safetensors", "pruning.json"}
    assert all((report.out / name).read_bytes() == (folder / name).read_bytes() for name in BELONGING)
    sentence = "Not copied, since it is no part of the result: onnx/, original/, a-Q4.gguf, consolidated.safeten"
    assert sentence in report.note
    assert json.loads((report.out / "pruning.json").read_text())["note"] == report.note
    assert AutoTokenizer.from_pretrained(report.out).chat_template


def test_a_folder_without_more_is_copied_without_a_word(tiny_llama, prune):
    assert prune(tiny_llama).note == ""


def test_a_result_with_folders_of_the_model_can_be_replaced(folder, prune):
    prune(folder)
    assert (prune(folder, overwrite=True).out / "1_Pooling" / "config.json").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_links_out_of_such_folders_are_refused(folder, prune, tmp_path, whole):
    (secret := tmp_path / "secret").mkdir()
    (secret / "key.txt").write_text("a secret")
    shutil.rmtree(folder / "additional_chat_templates")
    if whole:
        (folder / "additional_chat_templates").symlink_to(secret)
    else:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "a.jinja").symlink_to(secret / "key.txt")
    with pytest.raises(
        BadCheckpoint, match=r"is a link to .*secret.*, outside of the folder\. Put a copy in its place"
    ):
        prune(folder)
    assert not (tmp_path / "out").exists()


def test_the_index_in_use_is_kept(tiny_llama, tmp_path, prune):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder, max_shard_size="200kB")
    shutil.copy(tiny_llama / "tokenizer.json", folder)
    shutil.copy(tiny_llama / "tokenizer_config.json", folder)
    report = prune(folder)
    assert (report.out / "model.safetensors.index.json").exists()
    assert report.note == ""
