"""The table of methods. Trainers, configs, CLI, model cards and docs read it; nothing repeats it."""

from ..terms import Term
from ..terms.adaptive import AdaptiveMargin
from ..terms.alpha_dpo import ReferenceMargin
from ..terms.anchor import AnchorMargin, GradientNormMargin
from ..terms.baselines import DrDPOWeight, LengthMargin, MarginAdaptiveWeight, ScoreOffsetMargin
from ..terms.beta_dpo import BatchBetaMargin, KeptWeight
from ..terms.column import ColumnMargin, ColumnWeight
from ..terms.dynamic_target import DynamicTargetMargin
from ..terms.evaluation_factor import EvaluationFactorMargin
from ..terms.score_gap import ScoreGapWeight
from . import baselines, papers
from .row import Method, Paper, names_of

WEIGHTS: dict[str, type[Term]] = {
    term.name: term for term in (ScoreGapWeight, ColumnWeight, DrDPOWeight, KeptWeight, MarginAdaptiveWeight)
}
MARGINS: dict[str, type[Term]] = {
    term.name: term
    for term in (
        EvaluationFactorMargin,
        DynamicTargetMargin,
        AdaptiveMargin,
        AnchorMargin,
        GradientNormMargin,
        ColumnMargin,
        LengthMargin,
        ScoreOffsetMargin,
        ReferenceMargin,
        BatchBetaMargin,
    )
}

METHODS: dict[str, Method] = {method.id: method for method in (*papers.ROWS, *baselines.ROWS)}

__all__ = ["MARGINS", "METHODS", "WEIGHTS", "Method", "Paper", "names_of"]
