"""From a row of a preference set to its prompt, completions, scores and tokens: the one way that everything uses."""

from .form import PreferenceRow, RowError, RowReader
from .opened import OpenedSet, open_rows
from .prompts import open_prompts
from .tokens import RowTokens, tokenize

__all__ = ["OpenedSet", "PreferenceRow", "RowError", "RowReader", "RowTokens", "open_prompts", "open_rows", "tokenize"]
