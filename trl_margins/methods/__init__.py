"""The table of methods. Trainers, configs, CLI, model cards and docs read it; nothing repeats it."""

from ..terms import Term
from ..terms.adaptive import AdaptiveMargin
from ..terms.anchor import AnchorMargin, GradientNormMargin
from ..terms.column import ColumnMargin, ColumnWeight
from ..terms.dynamic_target import DynamicTargetMargin
from ..terms.evaluation_factor import EvaluationFactorMargin
from ..terms.score_gap import ScoreGapWeight
from . import baselines, papers
from .row import Method, Paper, names_of

WEIGHTS: dict[str, type[Term]] = {term.name: term for term in (ScoreGapWeight, ColumnWeight)}
MARGINS: dict[str, type[Term]] = {
    term.name: term
    for term in (
        EvaluationFactorMargin,
        DynamicTargetMargin,
        AdaptiveMargin,
        AnchorMargin,
        GradientNormMargin,
        ColumnMargin,
    )
}

METHODS: dict[str, Method] = {method.id: method for method in (*papers.ROWS, *baselines.ROWS)}

__all__ = ["MARGINS", "METHODS", "WEIGHTS", "Method", "Paper", "names_of"]
