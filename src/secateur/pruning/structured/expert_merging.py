"""`ream`: experts that go are merged into those that stay (Jha et al. 2026, arXiv:2604.04356).

    the experts with the highest scores of REAP stay
    → each of them in turn, the highest first, takes the experts nearest to it that are still free
    → their neurons are put in the order of its own, by what they do and by their weights
    → the mean of the group, weighted by score, stands in its place; its row of the router stays

How near two experts are: the mean of two likenesses from 0 to 1, the cosine of what they add to the
tokens on average, and how alike their gates are over the tokens. Which neuron is which: the
assignment with the least distance between normalised activations, and between normalised weights.

Departures: only experts that are chosen run, with the gates that the model applies to them. The
authors run all, weigh them by the softmax of the router, and compare its logits: so experts that
stand in for one another are near there, and here those that work together. Where no token has two
experts, outputs alone count. Activations are those of the same 512 tokens for all experts, weights
are compared whole and not by 64 principal components. Groups hold as many more as it takes where
few experts stay.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import normalize

from secateur.errors import NonFinite, UnsupportedModel
from secateur.models import experts
from secateur.models.replay import LanguageModel
from secateur.pruning.structured.expert_scores import Routed

GROUP = 16
"""An expert that stays is merged with so many, itself among them, at most: the authors' C."""
Neurons = Tensor
"""Of an experts module, which outputs of the first matrix make each input of the second: int64
`[inputs, 1 or 2]`.
"""


def apart(routed: Routed) -> Tensor:
    """How far experts are from one another, 0 to 1, float64 `[experts, experts]`."""
    added = normalize(routed.output, dim=1)
    likeness = (added @ added.T + 1) / 2
    if not routed.together.clone().fill_diagonal_(0).any():
        return 1 - likeness
    power = routed.together.diagonal().clamp_min(1e-30).sqrt()
    cosine = routed.together / (power[:, None] * power)
    gap = (2 - 2 * cosine).clamp_min(0).sqrt().fill_diagonal_(0)
    alike = 1 - gap / gap.max().clamp_min(1e-30)
    return 1 - (likeness + alike) / 2


def grouped(
    distance: Tensor, score: Tensor, kept: Tensor, router_groups: int = 1
) -> list[list[int]]:
    """For each expert that is `kept`, in their order, itself and those that are merged into it.

    Experts that a router sees in one of several groups stay there.
    """
    total = len(score)
    most = max(GROUP, -(-total // len(kept)))
    free, found = set(range(total)) - set(kept.tolist()), dict[int, list[int]]()
    inside = total // router_groups
    for centre in sorted(kept.tolist(), key=lambda one: -score[one].item()):
        near = distance[centre].argsort(stable=True).tolist()
        taken = [one for one in near if one in free and one // inside == centre // inside]
        found[centre] = [centre, *taken[: most - 1]]
        free -= set(found[centre])
    return [found[one] for one in kept.tolist()]


def neurons_of(module: nn.Module) -> Neurons:
    """How gate and up lie in the first matrix: in two halves or in turns. Raises UnsupportedModel
    where in no way that is known.
    """
    first, second = experts.matrices(module)
    inputs, outputs = experts.inputs(module, second), experts.outputs(module, first)
    order = torch.arange(inputs)
    ways = [order[:, None]] if outputs == inputs else []
    if outputs == 2 * inputs:
        ways = [torch.stack([order, inputs + order], 1), torch.stack([2 * order, 2 * order + 1], 1)]
    draw = torch.Generator().manual_seed(0)
    z, moved = torch.randn(1, outputs, generator=draw), order.roll(1)
    z = z.to(getattr(module, first).device)
    for neurons in ways:
        shuffled = z.clone()
        shuffled[:, neurons] = z[:, neurons[moved]]
        wanted = experts.activated(module, z)[:, moved]
        if torch.allclose(experts.activated(module, shuffled), wanted, rtol=1e-5, atol=1e-6):
            return neurons
    raise UnsupportedModel(
        f"How {type(module).__name__} makes {inputs} inputs of its second matrix of {outputs} "
        "outputs of its first is not known, so its experts cannot be merged. Use reap, which takes "
        "them out."
    )


def refuse_unknown_neurons(language_model: LanguageModel) -> None:
    """Raise UnsupportedModel where the experts of a block cannot be merged."""
    for block in language_model.blocks:
        for module in experts.fused_experts(block).values():
            neurons_of(module)


def aligned(module: nn.Module, centre: int, other: int, x: Tensor, neurons: Neurons) -> Tensor:
    """The neurons of another expert in the order of the centre's, int64, for tokens x
    `[tokens, in]`. Raises NonFinite.
    """
    cost = torch.zeros(len(neurons), len(neurons), dtype=torch.float64)
    for of in (_activations, _weights):
        mine, its = (normalize(of(module, e, x, neurons).double(), dim=1) for e in (centre, other))
        cost += torch.cdist(mine, its).cpu()
    if not cost.isfinite().all():
        raise NonFinite(
            f"Expert {centre} or {other} makes NaN or Inf of tokens that the router does not send "
            "there, so that their neurons cannot be compared. Use --dtype float32, or reap."
        )
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def _activations(module: nn.Module, expert: int, x: Tensor, neurons: Neurons) -> Tensor:
    """What enters the second matrix, `[neurons, tokens]`."""
    return experts.inner(module, expert, x).T


def _weights(module: nn.Module, expert: int, x: Tensor, neurons: Neurons) -> Tensor:
    """All weights of each neuron, `[neurons, weights]`."""
    first, second = (experts.matrix(module, part, expert) for part in experts.matrices(module))
    return torch.cat([first[neurons].flatten(1), second.T], 1)


def merged(
    module: nn.Module,
    stored: nn.Module,
    group: Sequence[int],
    score: Tensor,
    x: Tensor,
    neurons: Neurons,
) -> dict[str, Tensor]:
    """The parameters of the first expert of a group as they are `stored`, merged with the others,
    float32 by name. `module` says which neuron is which. Raises NonFinite.
    """
    shares = score[list(group)].double().clamp_min(1e-30)
    total: dict[str, Tensor] = {}
    for share, expert in zip((shares / shares.sum()).tolist(), group, strict=True):
        order = torch.arange(len(neurons))
        if expert != group[0]:
            order = aligned(module, group[0], expert, x, neurons)
        for name in experts.parameters(module):
            part = in_order(stored, name, expert, order, neurons).float().mul(share)
            total[name] = total[name] + part if name in total else part
    return total


def in_order(module: nn.Module, name: str, expert: int, order: Tensor, neurons: Neurons) -> Tensor:
    """A parameter of an expert, as it is stored, with its neurons in another order."""
    (_, second), part = experts.matrices(module), getattr(module, name)[expert]
    if name == f"{second}_bias":
        return part
    across = experts.is_transposed(module) and not name.endswith("_bias")
    if name == second:
        return part[order] if across else part[:, order]
    moved = part.clone()
    if across:
        moved[:, neurons.flatten()] = part[:, neurons[order].flatten()]
    else:
        moved[neurons.flatten()] = part[neurons[order].flatten()]
    return moved


@torch.no_grad()
def merge(
    module: nn.Module,
    stored: nn.Module,
    routed: Routed,
    score: Tensor,
    kept: Tensor,
    router_groups: int,
) -> None:
    """Merge the experts that are not `kept` into those that are, in the copy of their module that
    is `stored` and in the one that runs. Raises UnsupportedModel, NonFinite.
    """
    neurons, (first, _) = neurons_of(module), experts.matrices(module)
    x = routed.shown.to(getattr(module, first))
    for group in grouped(apart(routed), score, kept, router_groups):
        if len(group) == 1:
            continue
        for name, tensor in merged(module, stored, group, score, x, neurons).items():
            rounded = getattr(stored, name).data
            rounded[group[0]] = tensor
            getattr(module, name).data[group[0]] = rounded[group[0]]
