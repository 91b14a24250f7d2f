"""Secateur prunes pretrained language models and tells the truth about the result."""

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
from secateur.methods.patterns import parse
from secateur.models.load import load
from secateur.pruning.planning.forecast import forecast
from secateur.pruning.planning.measured import plan
from secateur.pruning.prune import prune, prune_model
from secateur.recovery.job import Recovery
from secateur.recovery.recover import recover

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
