"""From a row of a preference set to its prompt, its completions, its scores and its tokens: one way for everyone."""

from .form import PreferenceRow, RowError, RowReader
from .opened import OpenedSet, open_rows
from .tokens import RowTokens, tokenize

__all__ = ["OpenedSet", "PreferenceRow", "RowError", "RowReader", "RowTokens", "open_rows", "tokenize"]
