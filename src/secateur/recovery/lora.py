"""LoRA whose product is masked, in training as in the merge: W' = W + mask ∘ (scale · B A).

A plain adapter is dense: merged into a sparse matrix it fills the zeros, and masked only at the
merge it was trained as something else than what is merged (SPP, Lu et al. 2024, arXiv:2405.16057,
section 3). So the forward sees the masked sum. That costs a matrix of the weight's size for each
layer at a time, beside the two narrow ones that are trained.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class MaskedLora(Linear):
    """A LoRA layer over a linear layer or a Conv1D that keeps the zeros which the weight has."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config=config, **options)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.kept: Tensor
        self.register_buffer("kept", self._weight.detach() != 0, persistent=False)

    @property
    def _weight(self) -> Tensor:
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        return weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """mask ∘ (scale · B A), of the shape of the stored weight; what peft's merge adds."""
        return super().get_delta_weight(adapter) * self.kept

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **options)
        weight = self._weight
        for adapter in self.active_adapters:
            weight = weight + self.get_delta_weight(adapter).to(weight.dtype)
        return torch.func.functional_call(self.get_base_layer(), {"weight": weight}, (x,))


def with_adapters(model: PreTrainedModel, names: Sequence[str], rank: int, seed: int) -> PeftModel:
    """The model with a masked adapter of that rank on each layer named; nothing else is trained.

    Adapters begin at zero, with one of the two matrices random by `seed`, so that a run that is
    taken up is the same.
    """
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(names), bias="none"
    )
    config._register_custom_module({nn.Linear: MaskedLora, Conv1D: MaskedLora})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted
