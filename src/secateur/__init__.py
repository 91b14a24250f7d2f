"""Secateur prunes pretrained language models and tells the truth about the result."""

from secateur.advice.recommend import Recommendation, recommend
from secateur.bench import bench
from secateur.comparison.compare import compare
from secateur.comparison.join import report
from secateur.errors import SecateurError
from secateur.evaluate import evaluate
from secateur.export import export
from secateur.forecast import forecast
from secateur.formats.packed import load_packed
from secateur.inspection import inspect
from secateur.methods import METHODS, Method, Pruned, scored
from secateur.model import load
from secateur.packing import pack_model
from secateur.patterns import parse
from secateur.plan import plan
from secateur.prune import prune, prune_model
from secateur.recovery.job import Recovery
from secateur.recovery.recover import recover
from secateur.validate import validate

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
