"""Models of the hub, against a stand-in on this machine: what is fetched, and what is refused before any weight is.

Nothing leaves this machine; the commands are the ones that users type.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from support import forks
from support.families import tiny_model
from support.hub import COMMIT, Hub, serving
from support.texts import byte_tokenizer

import secateur
from secateur.errors import BadCheckpoint, DiskFull, SecateurError, UnsupportedModel
from secateur.models.load import load, locate, resolve
from secateur.system.settings import Trust

NAME = "owner/model"
CONFIG = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
CODE = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A tiny Llama in shards, as a repository holds it, with what else may lie there."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    tiny_model("llama").save_pretrained(folder, max_shard_size="200kB")
    byte_tokenizer().save_pretrained(folder)
    for name in ("onnx/model.onnx", "original/consolidated.00.pth", "model.fp16.safetensors", "consolidated.safetensors",  # noqa: E501
                 "model.fp16.safetensors.index.json", "pytorch_model.bin", "README.md", "own.py", "figure.png",
                 "gguf/model-q4.gguf", ".gitattributes"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    for name in ("LICENSE", "chat_template.jinja", "additional_chat_templates/tools.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def hub(sharded, tmp_path, monkeypatch):
    """A hub with one model."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    shutil.copytree(sharded, tmp_path / "hub" / NAME)
    with serving(tmp_path / "hub", tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def folder(hub) -> Path:
    """The repository, to be changed."""
    return hub.folder / NAME


def fetched(hub: Hub) -> set[str]:
    """The files that the hub was asked for so far, and is not asked for again."""
    names = {name.removeprefix(f"{NAME}/") for name in hub.asked}
    hub.asked.clear()
    return names


SHARDS = {f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)}
SMALL = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json",
    "chat_template.jinja", "additional_chat_templates/tools.jinja", "LICENSE",
}  # fmt: skip


def test_what_is_fetched_is_what_is_needed(hub):
    secateur.forecast(NAME, samples=4, seq_len=16, measure=False)
    assert fetched(hub) == {"config.json", "model.safetensors.index.json"}
    assert load(resolve(NAME)).ignored == ()
    assert fetched(hub) == SMALL - {"config.json", "model.safetensors.index.json"} | SHARDS
    resolve(NAME)
    assert fetched(hub) == set()


def test_one_file_is_taken_before_the_shards(hub, folder, sharded, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", folder)
    load(resolve(NAME))
    assert {name for name in fetched(hub) if name.endswith(".safetensors")} == {"model.safetensors"}


def test_the_config_may_name_the_weights(hub, folder, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", folder / "other.safetensors")
    changed(folder, transformers_weights="other.safetensors")
    load(resolve(NAME))
    assert {name for name in fetched(hub) if name.endswith(".safetensors")} == {"other.safetensors"}


def changed(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def bare(folder: Path, *names: str) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").unlink()
    for name in names:
        (folder / name).write_bytes(b"{}")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: bare(f, "a-Q4.gguf"), r"owner/model holds a GGUF file and no .* \(a-Q4\.gguf\)\. Name that"),
        (lambda f: bare(f, "pytorch_model.bin"), r"has only pickled weights \(pytorch_model\.bin\)"),
        (lambda f: bare(f, "adapter_config.json"), "holds an adapter, not a model"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds a model and an adapter"),
        (lambda f: bare(f, "consolidated.safetensors"), "holds weights in Mistral's own layout"),
        (lambda f: bare(f, "tf_model.h5"), r"weights for another framework alone \(tf_model\.h5\)"),
        (lambda f: bare(f, "__0_0.distcp"), r"shards that FSDP has saved .*accelerate merge-weights"),
        (lambda f: bare(f), r"has no weights: neither model\.safetensors nor model\.safetensors\.index"),
        (lambda f: (f / "config.json").unlink(), r"consolidated\.safetensors"),
        (lambda f: (bare(f), (f / "config.json").unlink()), "is no model of transformers: it has no config"),
        (lambda f: changed(f, quantization_config={"quant_method": "own"}), "quantis"),
        (lambda f: changed(f, model_type="own", auto_map={"AutoConfig": "own.A"}), "needs code of its own"),
        (lambda f: changed(f, model_type="no-such"), "describes no model that transformers knows"),
        (lambda f: changed(f, num_hidden_layers=10**9), "no model has so many"),
        (lambda f: (f / "config.json").write_text("["), r"is no JSON"),
        (lambda f: (f / "model-00002-of-00004.safetensors").unlink(), r"model-00002-of-00004\.safetensors, which the"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "is no index of safetensors shards"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_weight_is_fetched(hub, folder, spoil, words):
    spoil(folder)
    with pytest.raises(SecateurError, match=words):
        resolve(NAME)
    assert not [name for name in hub.asked if not name.endswith((".json", ".jinja", "LICENSE"))]


@pytest.mark.parametrize(
    ("manner", "words"),
    [
        (
            "gated",
            r"only to those who have accepted its terms\. Accept them at http.*/owner/model, and log in: hf auth",
        ),
        ("missing", r"neither a folder here nor a model that the hub gives out\. Check the name; if it is private"),
        ("private", r"neither a folder here nor a model that the hub gives out\. Check the name; if it is private"),
        ("limited", r"too many requests \(429\) to give owner/model now\. Wait some minutes, or log in"),
        ("down", r"the hub cannot be reached \(it answers 503\)\. Try again with a connection, or name a folder"),
        ("cut", r"The connection to the hub was lost while owner/model was fetched .*Run the same command again"),
    ],
)
def test_what_the_hub_does_is_a_sentence(hub, manner, words):
    hub.manners[NAME] = manner
    with pytest.raises(BadCheckpoint, match=words):
        resolve(NAME)
    hub.manners.clear()
    assert load(resolve(NAME)).blocks  # and the same command goes on


def test_names_that_cannot_be(hub, monkeypatch):
    for name in ("a b", "owner/model-", "x" * 200):
        with pytest.raises(BadCheckpoint, match="neither a folder here nor a model that the hub gives out: "):
            resolve(name)


def test_revisions(hub, tmp_path, text_file):
    with pytest.raises(BadCheckpoint, match="has no revision 'nope'; a branch, a tag or a commit was wanted"):
        resolve(NAME, Trust(revision="nope"))
    with pytest.raises(BadCheckpoint, match="has no revision 'nope'"):
        resolve(f"{NAME}@nope")
    assert resolve(f"{NAME}@refs/pr/1").name == resolve(NAME, Trust(revision="main")).name == COMMIT
    with pytest.raises(BadCheckpoint, match=r"--revision main is for names of the hub; .* is a folder\. Leave it out"):
        resolve(hub.folder / NAME, Trust(revision="main"))
    given = {"calibration": str(text_file), "samples": 4, "seq_len": 16}
    report = secateur.prune(NAME, out=tmp_path / "out", method="magnitude", revision=COMMIT, **given)
    assert report.out
    record = json.loads((report.out / "pruning.json").read_text())
    assert record["hub"] == {"repository": NAME, "commit": COMMIT}
    assert not (report.out / "own.py").exists()
    again = secateur.evaluate(report.out, dense=f"{NAME}@main", evaluation=str(text_file), windows=2, seq_len=16)
    assert again.kl


def test_bench_takes_models_of_the_hub_at_a_revision(hub, tmp_path):
    given = {
        "dense": hub.folder / NAME,
        "prompt": [4],
        "new": 1,
        "rounds": 3,
        "runtimes": ["eager"],
        "dtype": "float32",
    }
    with pytest.raises(BadCheckpoint, match="has no revision 'nope'"):
        secateur.bench([NAME], revision="nope", **given)
    with pytest.raises(BadCheckpoint, match="--revision main is for names of the hub"):
        secateur.bench([hub.folder / NAME], revision="main", **given)
    assert {timing.model for timing in secateur.bench([NAME], revision="main", **given).timings} == {"dense", "model"}


def test_code_is_fetched_and_run_where_it_is_trusted(hub, folder, tmp_path):
    (folder / "configuration_own.py").write_text(CONFIG)
    (folder / "modeling_own.py").write_text(CODE)
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    changed(folder, model_type="own", auto_map=code, architectures=["OwnForCausalLM"])
    with pytest.raises(UnsupportedModel, match="needs code of its own"):
        resolve(NAME)
    assert not any(name.endswith(".py") for name in fetched(hub))
    trust = Trust(trust_remote_code=True)
    language_model = load(resolve(NAME, trust), trust_remote_code=True)
    assert type(language_model.model).__name__ == "OwnForCausalLM"
    assert {"configuration_own.py", "modeling_own.py", "own.py"} <= fetched(hub)
    given = {"dense": NAME, "prompt": [4], "new": 1, "rounds": 3, "runtimes": ["eager"], "dtype": "float32"}
    with pytest.raises(UnsupportedModel, match="add --trust-remote-code"):
        secateur.bench([], **given)
    assert secateur.bench([], trust_remote_code=True, **given).timings
    with pytest.raises(UnsupportedModel, match="add --trust-remote-code"):
        secateur.export(NAME, to="packed", out=tmp_path / "packed")
    with pytest.raises(UnsupportedModel, match="there is nothing to pack"):  # which its matrices say
        secateur.export(NAME, to="packed", out=tmp_path / "packed", trust_remote_code=True)


def test_offline_what_was_fetched_before_is_used(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        BadCheckpoint, match=r"gives out: HF_HUB_OFFLINE is set\. Fetch it once without that: hf download"
    ):
        resolve(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    locate(NAME, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(NAME, weights=False).name == COMMIT
    with pytest.raises(
        BadCheckpoint, match=r"Only a part of owner/model was fetched before, without its weights\. .*OFFLINE"
    ):
        resolve(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    resolve(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(resolve(NAME)).blocks


def test_a_hub_that_is_gone(hub, monkeypatch):
    resolve(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert load(resolve(NAME)).blocks
    with pytest.raises(BadCheckpoint, match=r"the hub cannot be reached \(.*refused.*\)\. Try again with a connection"):
        resolve("owner/other")


def test_a_disk_that_is_too_small(hub, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    full = SimpleNamespace(disk_usage=lambda folder: usage(10, 5, 5))
    monkeypatch.setattr("secateur.checkpoints.hub.shutil", full)
    with pytest.raises(
        DiskFull, match=r"has 0\.\d+ MiB of weights to fetch, the disk of .*cache 0\.00 MiB free\. Free"
    ):
        resolve(NAME)
    assert not [name for name in hub.asked if name.endswith(".safetensors")]


def test_the_command_itself_in_a_process_of_its_own(hub, tmp_path):
    """The client reads its settings when it is imported, so nothing is patched in the first."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "secateur", "inspect"]
    done = subprocess.run([*command, NAME, "--revision", COMMIT, "--json"], env=env, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"].endswith(COMMIT)
    assert fetched(hub) == SMALL | SHARDS
    hub.manners[NAME] = "gated"
    done = forks.run([*command, f"{NAME}@refs/pr/1"], env=os.environ)
    assert done.returncode == 2
    assert done.stderr.startswith("secateur: The hub gives owner/model only to those who have accepted its terms.")
    assert done.stderr.count("\n") == 1


def test_the_revision_is_that_of_the_model_and_not_of_what_it_is_held_against(hub, sharded):
    found = secateur.inspect(NAME, revision=COMMIT, against=sharded)
    assert found.against is not None
    assert (found.against.came_back, found.against.vanished) == (0, 0)


# Pickles, and the command that converts them.


def pickled(folder: Path, *, shards: bool, state_dict: bool = False) -> dict[str, torch.Tensor]:
    """Write a tiny Llama with a tied head as pickles; its tensors by name."""
    from support.families import tiny_config
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama")
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    model.config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = model.state_dict()
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    tensors["model.norm.weight"] = torch.randn(2 * len(tensors["model.norm.weight"]))[::2]  # strided
    names = sorted(tensors)
    if not shards:
        content = {"state_dict": tensors, "epoch": 3} if state_dict else tensors
        torch.save(content, folder / ("last.ckpt" if state_dict else "pytorch_model.bin"))
        torch.save({"lr": 1}, folder / "optimizer.pt")
    for number, part in enumerate((names[::2], names[1::2]), 1) if shards else ():
        torch.save({name: tensors[name] for name in part}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    return tensors


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", ["model", "it's a $(touch hole) model"])
def test_the_command_of_the_refusal_converts_pickles(tmp_path, shards, name):
    folder = tmp_path / name
    folder.mkdir()
    tensors = pickled(folder, shards=shards)
    converts(folder, tensors, tmp_path)


def test_a_trainers_checkpoint_is_converted_too(tmp_path):
    (folder := tmp_path / "model").mkdir()
    converts(folder, pickled(folder, shards=False, state_dict=True), tmp_path)


def converts(folder: Path, tensors: dict[str, torch.Tensor], place: Path) -> None:
    with pytest.raises(BadCheckpoint, match="which can run code when loaded") as refused:
        load(folder)
    _, _, command = str(refused.value).partition("runs none: ")
    run_shell(command.removesuffix(" ."), place)
    assert not (place / "hole").exists()
    written = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert load(folder).ignored == ()


def run_shell(command: str, place: Path, **environment: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **environment}
    done = subprocess.run(["/bin/sh", "-c", command], cwd=place, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pickles_of_the_hub_are_fetched_by_the_command_and_converted(hub, folder, tmp_path):
    shutil.rmtree(folder)
    folder.mkdir()
    tensors = pickled(folder, shards=False)
    with pytest.raises(BadCheckpoint, match="hf download owner/model --local-dir model && python -c ") as refused:
        resolve(NAME)
    command = str(refused.value).partition("runs none: ")[2].removesuffix(" .")
    run_shell(command, tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == tensors.keys()


def test_pickles_that_run_code_are_not_converted(tmp_path):
    (folder := tmp_path / "model").mkdir()
    pickled(folder, shards=False)

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'hole'}",))

    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint) as refused:
        load(folder)
    with pytest.raises(AssertionError, match="weights_only"):
        run_shell(str(refused.value).partition("runs none: ")[2].removesuffix(" ."), tmp_path)
    assert not (tmp_path / "hole").exists()


def test_parts_of_pickles_that_nobody_knows_have_another_way_out(tmp_path):
    (folder := tmp_path / "model").mkdir()
    pickled(folder, shards=False)
    (folder / "pytorch_model.bin").unlink()
    for number in (0, 1):
        torch.save({}, folder / f"consolidated.0{number}.pth")
    with pytest.raises(
        BadCheckpoint, match=r"pickled weights \(consolidated\.00\.pth\).*in a place you trust, and call save"
    ):
        load(folder)
