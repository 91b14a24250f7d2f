"""`prune_checkpoint` with flat options, as tests like to give them."""

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from secateur.checkpoints.folder import Checkpoint
from secateur.checkpoints.record import Report
from secateur.data.windows import Windows
from secateur.models.replay import LanguageModel
from secateur.pruning.check import find_recipe
from secateur.pruning.opening import Opened
from secateur.pruning.prune import prune_checkpoint
from secateur.system.devices import find_resources
from secateur.system.settings import Compute, Destination, Recipe, Trust

Settings = TypeVar("Settings", Recipe, Compute, Destination, Trust)


def prune_opened(
    source: Checkpoint, language_model: LanguageModel, windows: Windows, out: Path, **options: Any
) -> Report:
    """Prune what is loaded into `out`; every option goes to the settings that have it."""

    def settings(kind: type[Settings]) -> Settings:
        return kind(**{each.name: options.pop(each.name) for each in fields(kind) if each.name in options})

    options["out"] = out
    chosen, resources = find_recipe(settings(Recipe)), find_resources(settings(Compute))
    destination, trust = settings(Destination), settings(Trust)
    return prune_checkpoint(Opened(source, language_model, windows), chosen, resources, destination, trust, **options)
