"""Draft heads: layers behind the blocks that guess further tokens (multi-token prediction).

Runtimes decode faster with them; transformers does not load them, so nothing here can run them.
Zeros leave them as they are. A smaller model would no longer fit them.
"""

import re
from typing import Any

from secateur.models.replay import LanguageModel, block_number

COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
"""The fields of configurations that say how many draft heads there are."""
_NAMED = re.compile(r"(^|\.)(mtp|nextn|eagle|medusa)\w*\.")


def draft_tensors(language_model: LanguageModel) -> list[str]:
    """The tensors of draft heads in the checkpoint of a model: by their name, or since they lie in
    blocks behind the last one.
    """
    stack, count = language_model.stack, len(language_model.blocks)
    return [
        name
        for name in language_model.ignored
        if _NAMED.search(name) or (block_number(name, stack) or 0) >= count
    ]


def draft_head_count(config: Any) -> int:
    """How many draft heads a configuration, the text part of it, speaks of."""
    return max(getattr(config, name, None) or 0 for name in COUNTS)


def without_draft_heads(config: Any) -> dict[str, int]:
    """What says in a configuration, the text part of it, that there are no draft heads."""
    return {name: 0 for name in COUNTS if getattr(config, name, None)}
