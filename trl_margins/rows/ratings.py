"""UltraFeedback's ratings of an answer, and what sets that were made from it call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .scores import as_number

RATINGS = ("overall_score", "fine-grained_score", "score", "rating", "reward", "rank")
OTHER_RATINGS = ("score", "rating", "reward", "rank")  # UltraFeedback has both of the others
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")  # of UltraFeedback's annotations

FORGED = (
    "{n} answers have the overall_score 10 and a mean rating of at most 2: early revisions of UltraFeedback have 10 "
    "where the annotator wrote 1. Load a later revision, or rate by the mean of the annotations: "
    "score_columns=['helpfulness', 'honesty', 'instruction_following', 'truthfulness'] "
    "(--score_columns helpfulness honesty instruction_following truthfulness)"
)


def rating_of(annotation: Any) -> Any:
    """UltraFeedback's annotation is a mapping; sets that were made from it have its parts by other names, or the
    number alone.
    """
    if not isinstance(annotation, Mapping):
        return annotation
    by_name = {str(name).lower(): value for name, value in annotation.items() if value is not None}
    return by_name.get("rating", by_name.get("score"))


def numbers_elsewhere(annotation: Any) -> list[str]:
    """The keys of an annotation's numbers, if it has no rating."""
    if not isinstance(annotation, Mapping) or {"rating", "score"} & {str(key).lower() for key in annotation}:
        return []
    return [str(key) for key, value in annotation.items() if isinstance(as_number(value), int | float)]


def is_forged(ratings: Mapping[str, Any]) -> bool:
    """Whether an overall score of 10 stands for 1."""
    rated = [value for name in ASPECTS if isinstance(value := as_number(ratings.get(name)), int | float)]
    return as_number(ratings["overall_score"]) == 10 and bool(rated) and sum(rated) / len(rated) <= 2
