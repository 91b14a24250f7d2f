"""Secateur prunes pretrained language models and tells the truth about the result."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.deployment.bench import bench
    from secateur.deployment.export import export
    from secateur.deployment.formats.packed import load_packed
    from secateur.deployment.inspect import inspect
    from secateur.deployment.packed_model import pack_model
    from secateur.deployment.validate import validate
    from secateur.errors import SecateurError
    from secateur.evaluation.advice.recommend import Recommendation, recommend
    from secateur.evaluation.comparison.compare import compare
    from secateur.evaluation.comparison.join import report
    from secateur.evaluation.perplexity import evaluate
    from secateur.methods import METHODS, Method, Pruned, scored
    from secateur.methods.pattern_text import parse
    from secateur.models.load import load
    from secateur.pruning.in_memory import prune_model
    from secateur.pruning.planning.forecast import forecast
    from secateur.pruning.planning.measured import plan
    from secateur.pruning.prune import prune
    from secateur.recovery.job import Recovery
    from secateur.recovery.recover import recover

_ROOMS = {
    "METHODS": "methods",
    "Method": "methods",
    "Pruned": "methods",
    "Recommendation": "evaluation.advice.recommend",
    "Recovery": "recovery.job",
    "SecateurError": "errors",
    "bench": "deployment.bench",
    "compare": "evaluation.comparison.compare",
    "evaluate": "evaluation.perplexity",
    "export": "deployment.export",
    "forecast": "pruning.planning.forecast",
    "inspect": "deployment.inspect",
    "load": "models.load",
    "load_packed": "deployment.formats.packed",
    "pack_model": "deployment.packed_model",
    "parse": "methods.pattern_text",
    "plan": "pruning.planning.measured",
    "prune": "pruning.prune",
    "prune_model": "pruning.in_memory",
    "recommend": "evaluation.advice.recommend",
    "recover": "recovery.recover",
    "report": "evaluation.comparison.join",
    "scored": "methods",
    "validate": "deployment.validate",
}
"""Every public name and the module that it comes from; imported when it is asked for, since most
need torch.
"""

__all__ = [
    "METHODS",
    "Method",
    "Pruned",
    "Recommendation",
    "Recovery",
    "SecateurError",
    "bench",
    "compare",
    "evaluate",
    "export",
    "forecast",
    "inspect",
    "load",
    "load_packed",
    "pack_model",
    "parse",
    "plan",
    "prune",
    "prune_model",
    "recommend",
    "recover",
    "report",
    "scored",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"secateur.{_ROOMS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
