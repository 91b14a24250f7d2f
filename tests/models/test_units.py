"""Where channels arrive, which of them form units, and that units may change places in every family that has some."""

import re

import pytest
import torch
from reference.permutation import arrivals
from support.families import tiny_model
from torch import Tensor

from secateur.models.channels.groups import ChannelGroup, interchangeable
from secateur.models.channels.trace import Trace, entering, trace
from secateur.models.load import replayable
from secateur.models.matrices import signature, weight_matrices
from secateur.models.replay import LanguageModel
from secateur.pruning.permute import reorder, verified

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(3))

pytestmark = pytest.mark.filterwarnings("ignore")  # each family warns about itself in its own way

GQA, MHA, MQA, FFN, EXPERT = "2 x 16 of 2", "4 x 16 of 1", "1 x 16 of 4", "1 x 128 of 1", "1 x 64 of 1"
FREE: dict[str, list[dict[str, str]]] = {
    "apertus": [{"self_attn.o_proj": GQA, "mlp.down_proj": FFN}],
    "bitnet": [{}],
    "bloom": [{"self_attention.dense": MHA, "mlp.dense_4h_to_h": "1 x 256 of 1"}],
    "cohere2": [{"self_attn.o_proj": GQA, "mlp.down_proj": FFN}],
    "deepseek_v3": [
        {"self_attn.o_proj": MHA, "mlp.down_proj": FFN},
        {"self_attn.o_proj": MHA, "mlp.experts.3.down_proj": EXPERT, "mlp.shared_experts.down_proj": EXPERT},
    ],
    "falcon": [{"self_attention.dense": MQA, "mlp.dense_4h_to_h": FFN}],
    "gemma2": [{"self_attn.o_proj": GQA, "mlp.down_proj": FFN}],
    "gemma3n_text": [
        {"laurel.linear_right": "1 x 16 of 1"},
        {"laurel.linear_right": "1 x 16 of 1", "mlp.down_proj": FFN},
    ],
    "gemma4_text": [{"mlp.down_proj": FFN}],
    "glm4": [{"self_attn.o_proj": GQA, "mlp.down_proj": FFN}],
    "gpt2": [{"attn.c_proj": MHA, "mlp.c_proj": FFN}],
    "gpt_neox": [{"attention.dense": MHA, "mlp.dense_4h_to_h": FFN}],
    "gpt_oss": [{"self_attn.o_proj": GQA, "mlp.experts.3.down_proj": FFN}],
    "jamba": [
        {"feed_forward.down_proj": FFN},
        {"feed_forward.experts.3.down_proj": FFN},
        {"self_attn.o_proj": GQA, "feed_forward.down_proj": FFN},
    ],
    "lfm2": [{"feed_forward.w2": "1 x 256 of 1"}, {"self_attn.out_proj": GQA, "feed_forward.w2": "1 x 256 of 1"}],
    "llama": [{"self_attn.o_proj": GQA, "mlp.down_proj": FFN}],
    "mamba": [{}],
    "mamba2": [{}],
    "mixtral": [{"self_attn.o_proj": GQA, "mlp.experts.3.down_proj": FFN}],
    "mpt": [{"attn.out_proj": MHA, "ffn.down_proj": "1 x 256 of 1"}],
    "olmo2": [{"self_attn.o_proj": GQA, "mlp.down_proj": FFN}],
    "opt": [{"self_attn.out_proj": MHA, "fc2": FFN}],
    "phi3": [{"self_attn.o_proj": GQA, "mlp.down_proj": FFN}],
    "qwen2": [{"self_attn.o_proj": GQA, "mlp.down_proj": FFN}],
    "qwen3_moe": [{"self_attn.o_proj": GQA, "mlp.experts.3.down_proj": EXPERT}],
    "qwen3_next": [
        {"mlp.experts.3.down_proj": EXPERT, "mlp.shared_expert.down_proj": EXPERT},
        {"self_attn.o_proj": GQA, "mlp.experts.3.down_proj": EXPERT, "mlp.shared_expert.down_proj": EXPERT},
    ],
}
"""What may change places in the first blocks of a family: classes x units of inputs, of the last expert only."""

ONLY_BY_NUMBERS = {
    ("falcon_h1", 0): {"mamba.out_proj"},  # a norm that is a function of the mixer, and a short convolution
    ("gemma3n_text", 0): {"mlp.down_proj", "per_layer_projection"},  # a gate that is cut at a quantile of all channels
    ("gemma4_text", 0): {"per_layer_projection"},  # a factor that comes with the call
    ("gemma4_text", 2): {"per_layer_projection", "self_attn.o_proj"},  # keys and values of another block
    ("lfm2", 0): {"conv.out_proj"},  # a short convolution
    ("qwen3_next", 0): {"linear_attn.out_proj"},  # a short convolution
}


def classes_of(language_model: LanguageModel, index: int) -> dict[str, list[list[ChannelGroup]]]:
    found = trace(language_model, index)
    return {name: interchangeable(found, name) for name in weight_matrices(language_model.blocks[index])}


def shuffled(classes: list[list[ChannelGroup]], inputs: int, generator: torch.Generator) -> Tensor:
    """A random order of a consumer's inputs, int64 `[in]`, within its classes."""
    order = torch.arange(inputs)
    for units in classes:
        places = torch.tensor([unit.inputs for unit in units])
        order[places] = places[torch.randperm(len(units), generator=generator)]
    return order


def checked(language_model: LanguageModel, index: int, classes: dict[str, list[list[ChannelGroup]]]):
    return verified(*entering(language_model, index, TOKENS[:2], CPU, torch.float32), classes)


def in_words(classes: list[list[ChannelGroup]]) -> str:
    (shape,) = {f"{len(units)} of {len(units[0].inputs)}" for units in classes}
    return f"{len(classes)} x {shape}"


@pytest.mark.parametrize("family", FREE)
def test_units_that_change_places_leave_the_logits_as_they_are(family: str):
    language_model = replayable(tiny_model(family))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = language_model.model(TOKENS, use_cache=False).logits
    kinds: dict[object, dict[str, list[list[ChannelGroup]]]] = {}
    moved = []
    for index, block in enumerate(language_model.blocks):
        kind = signature(block)
        if kind not in kinds:
            kinds[kind] = classes_of(language_model, index)
        moved.append(checked(language_model, index, kinds[kind]))
        for name, classes in moved[-1].items():
            order = shuffled(classes, weight_matrices(block)[name].weight.shape[1], generator)
            assert reorder(block, name, classes, order)
    with torch.no_grad():
        after = language_model.model(TOKENS, use_cache=False).logits
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    for wanted, found in zip(FREE[family], moved, strict=False):
        last = {name: in_words(units) for name, units in found.items() if not re.search(r"\.[012]\.", name)}
        assert last == wanted


@pytest.mark.parametrize(("family", "index"), ONLY_BY_NUMBERS)
def test_what_nan_does_not_see_is_caught_by_numbers(family: str, index: int):
    language_model = replayable(tiny_model(family))
    classes = classes_of(language_model, index)
    said = {name for name, units in classes.items() if units}
    assert said - checked(language_model, index, classes).keys() == ONLY_BY_NUMBERS[family, index]


def test_units_of_llama():
    language_model = replayable(tiny_model("llama"))
    classes = classes_of(language_model, 1)
    assert {name for name, units in classes.items() if units} == {"mlp.down_proj", "self_attn.o_proj"}
    (ffn,) = classes["mlp.down_proj"]
    assert ffn == [ChannelGroup((c,), (("mlp.gate_proj", c), ("mlp.up_proj", c))) for c in range(128)]
    for head, units in enumerate(classes["self_attn.o_proj"]):  # 2 key-value heads of 16, each read by 2 query heads
        assert units == [
            ChannelGroup((32 * head + c, 32 * head + 16 + c), (("self_attn.v_proj", 16 * head + c),)) for c in range(16)
        ]


@pytest.mark.parametrize(("family", "pair"), [("mixtral", (5, 128 + 5)), ("gpt_oss", (10, 11))])
def test_an_expert_gates_halves_or_neighbours(family: str, pair: tuple[int, int]):
    (units,) = classes_of(replayable(tiny_model(family)), 0)["mlp.experts.2.down_proj"]
    assert units[5] == ChannelGroup((5,), tuple(("mlp.experts.2.gate_up_proj", channel) for channel in pair))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "olmo2"])
def test_nan_arrives_where_a_poisoned_weight_sends_it(family: str):
    """The slow way: a whole forward for every channel. It does not stop at the first site, so only pairs compare."""
    language_model = replayable(tiny_model(family))
    found = trace(language_model, 1)
    block, hidden, call = entering(language_model, 1, TOKENS[:1], CPU, None)
    for producer in weight_matrices(block):
        slow = arrivals(block, hidden, call, producer)
        consumers = [consumer for source, consumer in found.reach if source == producer]
        for consumer in consumers:
            assert torch.equal(found.reach[producer, consumer], slow[consumer])
        if not consumers:
            assert found.leaks[producer].all()


def test_a_trace_of_llama_names_every_way():
    found = trace(replayable(tiny_model("llama")), 0)
    attention = [(f"self_attn.{name}_proj", "self_attn.o_proj") for name in "qkv"]
    entering_ffn = [("self_attn.o_proj", f"mlp.{name}_proj") for name in ("gate", "up")]
    leaving_ffn = [(f"mlp.{name}_proj", "mlp.down_proj") for name in ("gate", "up")]
    assert found.reach.keys() == {*attention, *entering_ffn, *leaving_ffn}
    leaking = {name: bool(leaks.all()) for name, leaks in found.leaks.items() if leaks.any()}
    assert leaking == {"self_attn.o_proj": True, "mlp.down_proj": True}
    assert found.direct == {*(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj"}


def same(one: Trace, other: Trace) -> bool:
    def equal(a, b) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    return equal(one.reach, other.reach) and equal(one.leaks, other.leaks) and one.direct == other.direct


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_trace_depends_neither_on_the_chunk_nor_on_the_dtype(family: str):
    language_model = replayable(tiny_model(family))
    wanted = trace(language_model, 2)
    assert same(trace(language_model, 2, batch=24), wanted)
    assert same(trace(language_model, 2, dtype=torch.bfloat16), wanted)


def test_values_that_a_later_block_reads_leak():
    leaks = trace(replayable(tiny_model("gemma4_text")), 0).leaks
    assert leaks["self_attn.v_proj"].all()
    assert not leaks["mlp.up_proj"].any()


def test_blocks_of_one_kind_have_one_signature():
    assert len({signature(block) for block in replayable(tiny_model("llama")).blocks}) == 1
    linear, full, *rest = map(signature, replayable(tiny_model("qwen3_next")).blocks)
    assert linear != full
    assert rest == [linear, full]
    sparse, dense, *_ = map(signature, replayable(tiny_model("gemma3n_text")).blocks)
    assert sparse != dense


def heads(count: int, width: int, groups: int = 1) -> dict[tuple[str, str], Tensor]:
    """What attention of `count` heads does: query channels reach their head, value channels one input of each."""
    head = torch.arange(count * width) // width
    per_group = torch.arange(count * width) // (count * width // groups) * width + torch.arange(count * width) % width
    return {
        ("q", "o"): head[:, None] == head,
        ("v", "o"): torch.arange(groups * width)[:, None] == per_group,
    }


def made(reach: dict[tuple[str, str], Tensor], direct: tuple[str, ...] = ()) -> Trace:
    leaks = {producer: torch.zeros(len(found), dtype=torch.bool) for (producer, _), found in reach.items()}
    return Trace(reach, leaks, frozenset(direct))


def test_grouped_queries_make_units_of_several_inputs():
    """With 71 heads of 64 (Falcon 7B) the value sets are the larger ones, and still the units."""
    for count, width in ((2, 3), (5, 3), (3, 3)):
        (units,) = interchangeable(made(heads(count, width)), "o")
        assert units == [ChannelGroup(tuple(range(c, count * width, width)), (("v", c),)) for c in range(width)]


def test_a_channel_of_a_part_of_a_unit_moves_with_it():
    reach = heads(2, 3) | {("gate", "o"): torch.eye(6, dtype=torch.bool)}
    (units,) = interchangeable(made(reach), "o")
    assert units[1] == ChannelGroup((1, 4), (("gate", 1), ("gate", 4), ("v", 1)))


def test_what_does_not_fit_is_not_exchangeable():
    whole = heads(2, 4, groups=2)
    assert [len(units) for units in interchangeable(made(whole), "o")] == [4, 4]
    assert interchangeable(made(whole, direct=("o",)), "o") == []
    leaking = made(whole)
    leaking.leaks["v"][3] = True
    assert interchangeable(leaking, "o") == []
    elsewhere = whole | {("v", "other"): torch.eye(8, dtype=torch.bool)}
    assert interchangeable(made(elsewhere), "o") == []
    assert interchangeable(made({("q", "o"): whole["q", "o"][:4]}), "o") == []  # half of the inputs come from nowhere
    assert interchangeable(made(whole), "missing") == []


def test_a_norm_between_holds_its_channels_in_place():
    reach = {("up", "down"): torch.eye(4, dtype=torch.bool)}
    assert len(interchangeable(made(reach), "down")) == 1
    leaks = made(reach).leaks
    assert (
        interchangeable(Trace(reach | {("norm", "down"): torch.eye(4, dtype=torch.bool)}, leaks, frozenset()), "down")
        == []
    )
