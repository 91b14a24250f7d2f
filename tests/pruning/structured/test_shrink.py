"""Smaller models, family by family: what is cut is what zeros would do, and stock code loads what is written."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.families import FUSED, tiny_config, tiny_model
from support.pruning import prune_opened
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.checkpoints.folder import open_checkpoint
from secateur.data.windows import Windows
from secateur.deployment.inspect import inspect
from secateur.errors import BadPattern, BadPlan, NonFinite, SecateurError, UnknownName, UnsupportedModel
from secateur.methods.pattern_text import parse
from secateur.models import experts
from secateur.models.load import load
from secateur.models.matrices import bias, weight_matrices
from secateur.pruning.check import find_recipe
from secateur.pruning.structured import block as smaller_block
from secateur.pruning.structured import feasibility, program, verify
from secateur.pruning.structured.expert_scores import highest_in_groups
from secateur.pruning.structured.slicing import without_groups
from secateur.system.settings import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # each family warns about itself in its own way

TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(7))
CHANNELS = """
    llama gpt2 opt phi3 falcon gptj gpt_neox gpt_bigcode gemma2 qwen3 cohere2 phi starcoder2 olmo2 codegen persimmon
    glm4 stablelm mixtral qwen2_moe gpt_oss deepseek_v3 jamba qwen3_next recurrent_gemma gemma4_text
""".split()  # noqa: SIM905
HEADS = """
    llama mistral qwen2 qwen3 phi3 gemma gemma2 gemma3_text granite glm4 cohere starcoder2 phi smollm3 nemotron mixtral
    qwen2_moe qwen3_moe qwen3_next jamba lfm2 falcon_h1
""".split()  # noqa: SIM905
BLOCKS = "llama gpt2 gemma2 qwen3_next deepseek_v3 lfm2 nemotron_h olmo_hybrid exaone_moe".split()  # noqa: SIM905
REFUSED = {
    ("bloom", "25% of channels"): "it has no field for the number of channels alone",
    ("bitnet", "25% of channels"): "no feed-forward channels that can go",
    ("gpt2", "25% of heads"): "it has no field for the number of heads alone",
    ("opt", "25% of heads"): "it has no field for the number of heads alone",
    ("falcon", "50% of heads"): "no heads that can go",
    ("olmo2", "50% of heads"): "no heads that can go",
    ("llama", "25% of experts"): "has no experts",
    ("gemma4_text", "1 block"): "kinds of block come in a fixed order",
}


def windows(seed: int = 1) -> Windows:
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(seed))
    return Windows(ids, "random", "none", 1, None)


@pytest.fixture
def in_process(monkeypatch) -> list[float]:
    """The check by a fresh process, made in this one, since starting it takes seconds; the differences it found."""
    found: list[float] = []

    def check(folder: Path, tokens: Tensor, logits: Tensor, **options) -> None:
        found.append(verify.difference(folder, tokens, logits, **options))
        assert found[-1] <= 1e-5

    monkeypatch.setattr(program, "refuse_unequal", check)
    return found


@pytest.fixture
def cuts(monkeypatch) -> list[dict]:
    """What was cut out of every block, in order, and the block as it was when it was cut."""
    seen: list[dict] = []

    def noted(block, gone):
        seen.append({"gone": gone, "state": deepcopy(block.state_dict())})
        return without_groups(block, gone)

    monkeypatch.setattr(smaller_block, "without_groups", noted)
    return seen


def smaller(family: str, folder: Path, pattern: str, method: str = "energy", **options):
    source, out = folder / "source", folder / "out"
    if not source.exists():
        tiny_model(family).save_pretrained(source)
    arguments = {"method": method, "pattern": pattern, "batch_size": 3, **options}
    report = prune_opened(open_checkpoint(source), load(source), windows(), out, **arguments)
    return report, source, out


@torch.no_grad()
def exact(model) -> Tensor:
    """A model's logits in float64: narrower matrices are multiplied by other kernels, which add in another order."""
    model.set_experts_implementation("eager")  # the others have no float64
    return model.eval().double()(TOKENS, use_cache=False).logits


def logits(folder: Path) -> Tensor:
    return exact(AutoModelForCausalLM.from_pretrained(folder))


def close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= 1e-6 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize(("family", "pattern"), [
    *((family, "25% of channels") for family in CHANNELS), *((family, "50% of heads") for family in HEADS),
])  # fmt: skip
def test_cutting_is_zeroing(family: str, pattern: str, tmp_path: Path, in_process, cuts):
    report, source, out = smaller(family, tmp_path, pattern)
    zeroed = load(source)
    for block, cut in zip(zeroed.blocks, cuts, strict=True):
        for name, units in cut["gone"].items():
            weight_matrices(block)[name].weight[:, [i for unit in units for i in unit.inputs]] = 0
    wanted = exact(zeroed.model)
    assert any(cut["gone"] for cut in cuts)
    assert close(logits(out), wanted)
    assert report.parameters is not None
    before, after = report.parameters
    assert after < before == zeroed.model.num_parameters()
    assert after == AutoModelForCausalLM.from_pretrained(out).num_parameters()


@pytest.mark.parametrize(
    ("family", "pattern"), [("llama", "50% of heads"), ("opt", "25% of channels"), ("mixtral", "25% of channels")]
)
def test_repaired_weights_are_those_of_the_block_in_memory(family: str, pattern: str, tmp_path: Path, in_process, cuts):
    report, source, out = smaller(family, tmp_path, pattern, "obs+repair")
    zeroed = load(source)
    for block, cut in zip(zeroed.blocks, cuts, strict=True):
        block.load_state_dict(cut["state"])
    wanted = exact(zeroed.model)
    assert close(logits(out), wanted)
    plain = {s.site: s.output_error for s in smaller(family, tmp_path / "plain", pattern, "obs")[0].sites}
    assert sum(s.output_error < plain[s.site] for s in report.sites) >= 0.75 * len(plain)  # type: ignore[operator]


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_leave_without_a_trace(family: str, tmp_path: Path, in_process):
    report, source, out = smaller(family, tmp_path, "1 block", "influence")
    (gone,) = map(int, report.removed["blocks"].split(","))
    language_model = load(source)
    with torch.no_grad():
        skipped = language_model.blocks[gone]
        hook = skipped.register_forward_hook(
            lambda module, args, kwargs, output: entering(args, kwargs, output), with_kwargs=True
        )
        wanted = exact(language_model.model)
        hook.remove()
    assert close(logits(out), wanted)
    config = AutoConfig.from_pretrained(out)
    assert config.num_hidden_layers == 3
    kinds = getattr(AutoConfig.from_pretrained(source), "layer_types", None)
    if kinds:
        assert config.layer_types == [kind for i, kind in enumerate(kinds) if i != gone]


def entering(args, kwargs, output):
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@pytest.mark.parametrize("family", FUSED)
def test_experts_leave_and_the_router_chooses_among_the_rest(family: str, tmp_path: Path, in_process):
    report, source, out = smaller(family, tmp_path, "25% of experts", "reap")
    before, after = AutoModelForCausalLM.from_pretrained(source), AutoModelForCausalLM.from_pretrained(out)
    kept = {}
    for (name, old), (_, new) in zip(before.named_modules(), after.named_modules(), strict=True):
        if experts.is_experts(old):
            first = experts.matrices(old)[0]
            rows = [
                next(e for e in range(4) if torch.equal(getattr(old, first)[e], weight))
                for weight in getattr(new, first)
            ]
            assert len(rows) == 3
            kept[name] = rows
            parent = name.rpartition(".")[0]
            for module in experts.routers(before.get_submodule(parent)):
                if getattr(module, "weight", torch.empty(0)).shape[0] == 4:
                    (path,) = [n for n, m in before.named_modules() if m is module]
                    smaller_router = after.get_submodule(path)
                    assert torch.equal(module.get_parameter("weight")[rows], smaller_router.get_parameter("weight"))
    assert kept
    assert report.removed


@pytest.mark.parametrize("family", FUSED)
def test_a_merged_mixture_is_the_one_that_reap_leaves_but_for_what_was_merged(family: str, tmp_path: Path, in_process):
    """Router and all else are those of `reap`; of three experts two stand as they did."""
    folders = {}
    for method in ("reap", "ream"):
        report, _, out = smaller(family, tmp_path, "25% of experts", method, overwrite=True)
        assert report.removed
        folders[method] = dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())
    first = next(name for name in folders["reap"] if "experts" in name)
    changed = {
        name
        for name, tensor in folders["ream"].items()
        if tensor.shape != folders["reap"][name].shape or not torch.equal(tensor, folders["reap"][name])
    }
    assert changed
    early = first.split("experts")[0]  # later blocks have other inputs, and may lose others
    for name in (name for name in changed if name.startswith(early)):
        assert "experts" in name
        same = [torch.equal(*pair) for pair in zip(folders["ream"][name], folders["reap"][name], strict=True)]
        assert same.count(True) == 2


def test_experts_whose_neurons_are_not_known_are_refused_before_any_work(tmp_path: Path, in_process, monkeypatch):
    monkeypatch.setattr(experts, "activated", lambda module, z: z[:, : z.shape[1] // 2].cumsum(1))
    with pytest.raises(UnsupportedModel, match=r"MixtralExperts makes 128 inputs.*Use reap"):
        smaller("mixtral", tmp_path, "25% of experts", "ream")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("family", "pattern"), REFUSED)
def test_what_no_stock_configuration_holds_is_refused_before_any_work(
    family: str, pattern: str, tmp_path: Path, in_process
):
    with pytest.raises(SecateurError, match=REFUSED[family, pattern]):
        smaller(family, tmp_path, pattern, "default")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_refusal_names_the_counts_that_would_do(tmp_path: Path, in_process):
    model = tiny_model("gpt_neox")  # 4 heads of 16 on 64; with half of them a head would be 32 wide
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedModel, match="no field for the number of heads alone"):
        smaller("gpt_neox", tmp_path, "50% of heads")


def test_llama_is_carried_by_mistral_where_its_own_configuration_refuses(tmp_path: Path, in_process):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=8, vocab_size=128, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    report, _, out = smaller("llama", tmp_path, "25% of heads")  # 6 query heads: 64 is no multiple
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"] == "mistral"
    assert (written["num_attention_heads"], written["num_key_value_heads"], written["head_dim"]) == (6, 3, 8)
    assert report.removed == {"self_attn.o_proj": "1 of 4 key-value heads"}
    assert in_process == [pytest.approx(0, abs=1e-6)]


def test_several_structures_at_once(tmp_path: Path, in_process):
    report, _, out = smaller("llama", tmp_path, "1 block + 50% of heads + 25% of channels", "default")
    assert report.removed.keys() == {"self_attn.o_proj", "mlp.down_proj", "blocks"}
    config = AutoConfig.from_pretrained(out)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size) == (3, 1, 96)
    assert logits(out).shape[-1] == 128


def test_every_method_gives_a_model_that_loads(tmp_path: Path, in_process):
    names = [
        f"{name}{suffix}"
        for name in (*smaller_block.SELECTIONS, "fast", "default")
        for suffix in ("", "+repair", "+repair+dense-target")
    ]
    for name in names:
        smaller("llama", tmp_path, "25% of channels", name, overwrite=True)
    for name in ("influence", "angular", "kl", "influence+repair", "kl+repair", "best", "angular+refine"):
        smaller("llama", tmp_path, "2 blocks", name, overwrite=True)
    assert len(in_process) == len(names) + 7


def test_shards_and_index_follow(tmp_path: Path, in_process):
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "source", max_shard_size="200kB")
    _, source, out = smaller("qwen3_moe", tmp_path, "1 block + 25% of experts", "default")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {}
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as opened:
            held |= {name: (shard.name, opened.get_tensor(name).nbytes) for name in opened.keys()}  # noqa: SIM118
    assert index["weight_map"] == {name: shard for name, (shard, _) in held.items()}
    assert index["metadata"]["total_size"] == sum(size for _, size in held.values())
    assert len(open_checkpoint(source).shards) > 2
    assert open_checkpoint(out).bytes < open_checkpoint(source).bytes


def test_two_runs_give_the_same_bytes(tmp_path: Path, in_process):
    for name in ("one", "two"):
        smaller("llama", tmp_path / name, "25% of channels", "obs+repair")
    one, two = (open_checkpoint(tmp_path / name / "out").sha256() for name in ("one", "two"))
    assert one == two


def test_two_devices_choose_what_one_does(tmp_path: Path, in_process):
    for name, device in (("one", "cpu"), ("two", "cpu,cpu")):
        smaller("llama", tmp_path / name, "25% of channels + 50% of heads", "obs+repair", device=device)
    one, two = (logits(tmp_path / name / "out") for name in ("one", "two"))
    assert torch.allclose(one, two, atol=1e-5)


def test_bfloat16_is_written_as_bfloat16(tmp_path: Path, in_process):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "source")
    _, _, out = smaller("llama", tmp_path, "25% of channels", "obs+repair")
    assert {place.dtype for place in open_checkpoint(out).places.values()} == {"BF16"}


@pytest.mark.usefixtures("fresh_process")
def test_a_fresh_process_is_asked_and_believed(tmp_path: Path, monkeypatch):
    smaller("llama", tmp_path, "25% of channels")
    honest = program.run_block
    monkeypatch.setattr(program, "run_block", lambda *args: honest(*args).roll(1, -1))
    with pytest.raises(UnsupportedModel, match="does not reload as it was: its logits differ"):
        smaller("llama", tmp_path, "25% of channels", overwrite=True)
    assert open_checkpoint(tmp_path / "out").folder.exists()  # the one before stays
    assert not list(tmp_path.glob(".*"))


def test_a_stream_in_the_stored_dtype_goes_on_in_it(tmp_path: Path, in_process, monkeypatch):
    """As on a GPU, where `auto` leaves the forward passes in the dtype of the checkpoint."""
    monkeypatch.setattr(program, "forward_dtype", lambda name, device: None)
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "source")
    for pattern, method in (("25% of channels", "energy"), ("1 block + 50% of heads", "default"), ("1 block", "best")):
        smaller("llama", tmp_path, pattern, method, overwrite=True)


def test_a_call_in_bfloat16_does_for_float32(tmp_path: Path, in_process, monkeypatch):
    monkeypatch.setattr(program, "forward_dtype", lambda name, device: None)
    tiny_model("bloom").bfloat16().save_pretrained(tmp_path / "source")  # ALiBi comes with the call
    smaller("bloom", tmp_path, "1 block", "kl+repair")


def test_tensors_that_are_not_cut_keep_their_bytes(tmp_path: Path, in_process):
    model = tiny_model("llama").bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float() + 1e-5
    model.save_pretrained(tmp_path / "source")
    _, source, out = smaller("llama", tmp_path, "25% of channels + 1 block", "default")
    before, after = open_checkpoint(source), open_checkpoint(out)
    gone = json.loads((out / "pruning.json").read_text())["removed"]["blocks"]
    kept = [index for index in range(4) if str(index) != gone]
    for position, index in enumerate(kept):
        for name in ("input_layernorm.weight", "self_attn.q_proj.weight"):
            held = after.tensor(f"model.layers.{position}.{name}")
            assert torch.equal(held, before.tensor(f"model.layers.{index}.{name}"))
            assert held.dtype == (torch.float32 if "norm" in name else torch.bfloat16)


@pytest.mark.parametrize(("pattern", "method"), [("25% of channels", "energy"), ("30%", "magnitude")])
def test_no_zero_that_is_written_is_negative(pattern: str, method: str, tmp_path: Path, in_process):
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        if "up_proj" in name:
            parameter.data[:, ::2] = -0.0  # as a source may come that was pruned by others
    model.save_pretrained(tmp_path / "source")
    _, source, out = smaller("llama", tmp_path, pattern, method)
    before, after = (sum(tensor.negative_zeros for tensor in inspect(folder).tensors) for folder in (source, out))
    assert before > 0
    assert after == 0


def test_errors_are_numbers_where_weights_are_at_the_end_of_the_range(tmp_path: Path):
    model = tiny_model("llama")
    model.model.layers[-1].mlp.down_proj.weight.data *= 1e30  # the last matrix: nothing reads what comes out
    model.save_pretrained(tmp_path / "source")
    report, *_ = smaller("llama", tmp_path, "30%", "magnitude")
    (error,) = [site.output_error for site in report.sites if site.site == "model.layers.3.mlp.down_proj"]
    assert error is not None
    assert 0 < error < 1


@pytest.mark.parametrize("family", ["diffllama", "minicpm3"])
def test_blocks_that_know_their_number_or_count_are_refused(family: str, tmp_path: Path, in_process, monkeypatch):
    monkeypatch.setattr(program, "BLOCKS", {"influence": lambda *args: [1]})
    with pytest.raises(UnsupportedModel, match="it depends on their number or order"):
        smaller(family, tmp_path, "1 block", "influence")


def test_lists_that_only_happen_to_be_as_long_are_left(tmp_path: Path, in_process):
    model = tiny_model("llama")
    model.config.eos_token_id = [2, 5, 7, 9]
    model.save_pretrained(tmp_path / "source")
    _, _, out = smaller("llama", tmp_path, "1 block", "influence")
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [2, 5, 7, 9]


@pytest.mark.parametrize("pattern", ["25% of channels", "1 block"])
def test_weights_that_are_no_numbers_are_named(pattern: str, tmp_path: Path, in_process):
    model = tiny_model("llama")
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(NonFinite, match=r"layers\.1\.mlp\.down_proj"):
        smaller("llama", tmp_path, pattern, "fast" if "channels" in pattern else "angular")


@pytest.mark.parametrize("pattern", ["25% of experts", "50% of experts"])
def test_a_router_that_looks_in_groups_keeps_them(pattern: str, tmp_path: Path, in_process):
    config = tiny_config("deepseek_v3")
    config.n_routed_experts, config.n_group, config.topk_group = 8, 2, 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    smaller("deepseek_v3", tmp_path, pattern, "reap")
    with pytest.raises(BadPattern, match="Let a multiple of 2 stay, at least 4"):
        smaller("deepseek_v3", tmp_path, "37.5% of experts", "reap", overwrite=True)


def test_experts_go_from_every_group_alike():
    score = torch.tensor([5.0, 1.0, 4.0, 3.0, 0.0, 0.1, 0.3, 0.2])
    assert highest_in_groups(score, 4, 2).tolist() == [0, 2, 6, 7]
    assert highest_in_groups(score, 6, 1).tolist() == [0, 1, 2, 3, 6, 7]


@pytest.mark.parametrize(("family", "pattern", "method"), [
    ("mixtral", "25% of channels", "taylor+repair"), ("ernie4_5_moe", "25% of experts", "reap"),
])  # fmt: skip
def test_what_once_failed(family: str, pattern: str, method: str, tmp_path: Path, in_process):
    assert smaller(family, tmp_path, pattern, method)[0].removed


def test_expert_biases_and_biases_follow(tmp_path: Path, in_process):
    _, _, out = smaller("gpt_oss", tmp_path, "25% of channels", "obs+repair")
    block = load(out).blocks[0]
    site = weight_matrices(block)["mlp.experts.1.gate_up_proj"]
    assert site.weight.shape[0] == 2 * 96
    held = bias(block, site)
    assert held is not None
    assert held[1].shape == (192,)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("wanda", "25% of channels"), BadPattern, "'wanda' chooses single weights"),
        (("wandaa", "25% of channels"), UnknownName, "method for 25% of channels"),
        (("energy", "2 blocks"), UnknownName, "Known: angular, best, default, fast, influence, kl"),
        (("energy+refit", "25% of channels"), UnknownName, "refinement of a structured method"),
        (("energy", "50%"), BadPattern, "'energy' chooses whole structures"),
        (("reap+repair", "25% of experts"), UnknownName, "where no matrix reads what goes"),
        (("energy", "50% of heads", "uniform", (), 8), BadPattern, "--align 8 is for channels"),
        (("energy", "25% of channels", "owll"), UnknownName, "Did you mean 'owl'"),
        (("energy", "25% of channels", "owl"), BadPlan, "takes the same out of every block"),
        (("energy", "25% of channels", "uniform", ["o_proj"]), BadPattern, "cannot leave one matrix out"),
        (("kl", "1 block", "uniform", ["o_proj"]), BadPattern, "1 block takes out whole blocks, so --skip o_proj"),
        (("kl", "1 block", "owl"), BadPlan, "1 block takes out whole blocks; --allocate owl needs a percentage"),
        (("wanda", "50%", "uniform", (), 8), BadPattern, "--align is for the channels"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, kind, words):
    with pytest.raises(kind, match=words):
        find_recipe(Recipe(**dict(zip(("method", "pattern", "allocate", "skip", "align"), arguments, strict=False))))


@pytest.mark.parametrize(
    ("family", "pattern", "options", "words"),
    [
        ("llama", "25% of heads", {}, "One step is 50%"),
        ("llama", "99% of channels", {}, "nothing of them would be left"),
        ("llama", "25% of channels", {"align": 128}, "steps of 128"),
        ("llama", "4 blocks", {}, "From 1 to 3 can be removed"),
        ("mixtral", "75% of experts", {}, "At most 50% can go"),
    ],
)
def test_counts_that_cannot_be(family, pattern, options, words, tmp_path, in_process):
    with pytest.raises(BadPattern, match=words):
        smaller(family, tmp_path, pattern, "default", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.fixture(scope="module")
def trained_mixture(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> tuple[Path, Tensor]:
    """A Mixtral that was trained for a few seconds on the bytes of a text, and text that it did not see."""
    text = torch.tensor(list(text_file.read_bytes())) % 128
    rows = text[: len(text) // 64 * 64].view(-1, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_config("mixtral")
        config.output_router_logits, config.router_aux_loss_coef = True, 0.02
        model = AutoModelForCausalLM.from_config(config)
        optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
        for step in range(120):
            batch = rows[torch.randint(len(rows) // 2, (16,), generator=torch.Generator().manual_seed(step))]
            optimiser.zero_grad()
            model(batch, labels=batch).loss.backward()
            optimiser.step()
    model.config.output_router_logits = False
    folder = tmp_path_factory.mktemp("mixture") / "source"
    model.eval().save_pretrained(folder)
    return folder, rows


@torch.no_grad()
def loss_of(folder: Path, rows: Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model(rows[-64:], labels=rows[-64:]).loss.item()


def test_a_trained_mixture_can_spare_the_experts_that_reap_names(
    trained_mixture, tmp_path: Path, in_process, monkeypatch
):
    source, rows = trained_mixture
    lost = {}
    for name, score in (
        ("least", smaller_block.EXPERTS["reap"]),
        ("most", lambda routed: -smaller_block.EXPERTS["reap"](routed)),
    ):
        monkeypatch.setitem(smaller_block.EXPERTS, "frequency", score)
        prune_opened(
            open_checkpoint(source), load(source), Windows(rows[:16], "text", "none", 0, None), tmp_path / name,
            method="frequency", pattern="25% of experts",
        )  # fmt: skip
        lost[name] = loss_of(tmp_path / name, rows) - loss_of(source, rows)
    assert loss_of(source, rows) < 3.0  # 4.85 untrained
    assert lost["least"] < lost["most"]
    assert AutoConfig.from_pretrained(tmp_path / "least").num_local_experts == 3


@pytest.mark.parametrize(
    ("family", "share", "kinds"),
    [
        ("llama", 80, "channels"),
        ("llama", 60, "channels, blocks"),
        ("llama", 50, "channels, blocks, heads"),
        ("mixtral", 85, "experts"),
        ("gpt2", 80, "channels"),
    ],
)
def test_a_budget_is_kept_with_no_more_than_is_needed(family, share, kinds, tmp_path, in_process):
    report, _, out = smaller(family, tmp_path, f"to {share}% of parameters", "fast")
    assert report.parameters is not None
    before, after = report.parameters
    assert after <= share / 100 * before
    assert after >= (share - 10 if family == "mixtral" else share - 5) / 100 * before
    said = " ".join(["blocks" if where == "blocks" else what for where, what in report.removed.items()])
    assert all(kind in said for kind in kinds.split(", "))
    assert after == AutoModelForCausalLM.from_pretrained(out).num_parameters()


def test_a_kind_of_block_is_traced_once_however_often_it_is_asked(tmp_path, in_process, monkeypatch):
    asked = []
    honest = feasibility.trace
    monkeypatch.setattr(
        feasibility, "trace", lambda *args, **options: asked.append(args[1]) or honest(*args, **options)
    )
    smaller("llama", tmp_path, "to 50% of parameters", "fast")
    assert asked == [0]


def test_a_budget_in_bytes_is_the_size_on_disk(tmp_path, in_process):
    tiny_model("llama").save_pretrained(tmp_path / "source")
    size = open_checkpoint(tmp_path / "source").bytes
    smaller("llama", tmp_path, f"to {round(0.85 * size)}B", "fast")
    assert 0.8 * size < open_checkpoint(tmp_path / "out").bytes <= 0.85 * size
    with pytest.raises(BadPattern, match="bytes of weights already"):
        smaller("llama", tmp_path, "to 1GB", "fast", overwrite=True)
    with pytest.raises(BadPattern, match="out of reach"):
        smaller("llama", tmp_path, "to 20% of parameters", "fast", overwrite=True)


def test_a_repair_says_that_it_fills_zeros(tmp_path, in_process):
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        if "down_proj" in name:
            parameter.data[:, ::2] = 0
    model.save_pretrained(tmp_path / "source")
    report, _, _ = smaller("llama", tmp_path, "25% of channels", "fast")
    assert all("50% of it were zeros, which the repair has filled" in site.note for site in report.sites)


def test_a_span_that_nothing_takes_over_is_named(tmp_path, in_process):
    report, _, _ = smaller("mixtral", tmp_path, "1 block", "influence+repair")
    if report.removed["blocks"] != "0":
        assert any("no matrix here is simply added" in site.note for site in report.sites)


def test_a_parsed_structure_says_its_kind():
    assert parse("25% of channels").kind == "structured"
