"""Structured pruning the slow way: token by token, unit by unit, every least-squares problem solved anew in float64."""

import torch
from torch import Tensor


def ridge_refit(
    weight: Tensor, x: Tensor, kept: Tensor, damping: float, target: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """argmin over V (and b) of mean ‖y − V x_S − b‖² + λ Σ_j E[x_j²] ‖V_:j − W_:j‖², rows stacked under the tokens."""
    weight, x, target = weight.double(), x.double(), target.double()
    inside = x[:, kept]
    mean, wanted, power = inside.mean(0), target.mean(0), inside.square().mean(0)
    if bias is not None:
        inside, target = inside - mean, target - wanted
    scale = (damping * power * len(x)).sqrt()
    a = torch.cat([inside, torch.diag(scale)])
    b = torch.cat([target, scale[:, None] * weight[:, kept].T])
    solved = torch.zeros_like(weight)
    solved[:, kept] = torch.linalg.lstsq(a, b, driver="gelsd").solution.T
    if bias is None:
        return solved, None
    return solved, wanted - solved[:, kept] @ mean


def energies(weight: Tensor, x: Tensor, units: Tensor) -> Tensor:
    """The mean over tokens of what each unit adds to the output, squared."""
    return torch.stack([(x[:, unit].double() @ weight[:, unit].double().T).square().sum(1).mean() for unit in units])


def fluctuations(weight: Tensor, x: Tensor, units: Tensor) -> Tensor:
    """The same for the deviation of single inputs from their mean."""
    moved = x.double() - x.double().mean(0)
    power = [(moved[:, [i]] @ weight[:, [i]].double().T).square().sum(1).mean() for i in range(x.shape[1])]
    return torch.stack(power)[units].sum(1)


def greedy_removal(weight: Tensor, x: Tensor, units: Tensor, count: int, damping: float) -> list[int]:
    """One unit at a time, always the one without which the best refit of all that stay has the least error."""
    weight, x = weight.double(), x.double()
    gram = x.T @ x / len(x)
    gram += damping * torch.diag(gram.diagonal())
    gone: list[int] = []
    for _ in range(count):
        costs = {}
        for unit in range(len(units)):
            if unit in gone:
                continue
            out = units[[*gone, unit]].flatten()
            kept = torch.ones(x.shape[1], dtype=torch.bool)
            kept[out] = False
            refit = weight @ gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept])
            full = torch.zeros_like(weight)
            full[:, kept] = refit
            change = weight - full
            costs[unit] = ((change @ gram) * change).sum().item()
        gone.append(min(costs, key=lambda unit: costs[unit]))
    return sorted(gone)
