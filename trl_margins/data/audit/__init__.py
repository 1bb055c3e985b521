"""What a preference set looks like before training: scores, lengths, truncation, duplicates, evaluation factors. An
audit reports all that it finds and stops at nothing: bad scores and rows that no trainer could read are counted, with
the first of them, and left out of the numbers.
"""

from .distributions import Distribution, distribution, nice_edges
from .lengths import Lengths, Measure
from .overall import Audit, audit
from .split import SplitAudit

__all__ = [
    "Audit",
    "Distribution",
    "Lengths",
    "Measure",
    "SplitAudit",
    "audit",
    "distribution",
    "nice_edges",
]
