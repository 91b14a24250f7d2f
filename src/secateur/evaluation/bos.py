"""How much hangs on BOS: the same tokens, with BOS at the start of every window and without."""

import torch
from torch import Tensor

from secateur.data.reader import Reader
from secateur.evaluation.forward import Forward, mean_loss

WINDOWS, TOKENS, LEAST = 4, 128, 16
"""How many windows of how many tokens are looked at, and the fewest tokens that say anything."""
MUCH = 1.1
"""How many times as high one of two perplexities must be for a remark."""


@torch.no_grad()
def bos_note(model: Forward, reader: Reader) -> str:
    """A sentence where perplexity with BOS in each window differs by more than a tenth from that
    without, on the first few windows; else nothing.
    """
    tokens = model.tokens[:WINDOWS, 1 if reader.bos == "each-window" else 0 :][:, : TOKENS - 1]
    bos = reader.bos_token_id
    if bos is None or tokens.shape[1] < LEAST:
        return ""
    if (tokens[:, 0] == bos).all():  # windows of documents that all begin with it by themselves
        tokens = tokens[:, 1:]
    first = torch.full_like(tokens[:, :1], int(bos))
    without, inside = _loss(model, tokens, 0), _loss(model, torch.cat([first, tokens], 1), 1)
    ratio = (without - inside).exp().item()
    if 1 / MUCH <= ratio <= MUCH:
        return ""
    better = "each-window" if ratio > 1 else "stream"
    rest = (
        f"The way in use is --bos {reader.bos}."
        if (reader.bos == "each-window") == (better == "each-window")
        else f"The way in use is --bos {reader.bos}; --bos {better} is the better one here."
    )
    return (
        f"Much hangs on BOS: perplexity on the same tokens is {without.exp():.4g} without and "
        f"{inside.exp():.4g} with BOS before each of {len(tokens)} windows. {rest}"
    )


def _loss(model: Forward, tokens: Tensor, left_out: int) -> Tensor:
    """The mean loss of tokens `[windows, length]`, those after the first and `left_out` more."""
    forward = model.on(tokens)
    windows = slice(0, len(tokens))
    logits = forward.logits(windows, forward.hidden(windows))[:, left_out:]
    targets = tokens[:, 1 + left_out :, None].to(logits.device)
    return mean_loss(logits.log_softmax(-1), targets).mean()
