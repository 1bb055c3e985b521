"""What training would otherwise hide of a data set, in words."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from functools import partial
from typing import NamedTuple

from ..checks import odd_letters
from .beside import unused_notes
from .counts import RowCounts, taken_for
from .form import RowReader, is_system
from .messages import USUAL_ROLES

# Columns that may say which completion is the better one
_VERDICTS = {"label", "labels", "winner", "preference", "preferred", "better", "best", "choice", "is_chosen"}


def why_refused(reader: RowReader, counts: RowCounts) -> str | None:
    """Why reading a set would be a guess: a column has more of the prompt, or completions begin alike by chance."""
    if 1 < counts.named == counts.n:
        return (
            f"chosen and rejected of the {reader.split} data set are names of columns, or their ends, in all its "
            f"{counts.n} rows: replace them by the completions themselves, with dataset.map; or, if these are the "
            "completions, rename the columns that are called so"
        )
    if 1 < counts.referring == counts.n:
        return (
            f"chosen and rejected of the {reader.split} data set only say which text of the columns "
            f"{sorted(counts.referred)} they are, in all its {counts.n} rows: replace them by the texts themselves, "
            "with dataset.map"
        )
    if 0 < counts.dialogues.n == counts.prompted:
        return (
            f"columns 'chosen' and 'rejected', {reader.where(counts.dialogues.first)}: they are whole dialogues, "
            f"which begin with the same text, and their prompt in it, as in all {counts.prompted} rows of text with a "
            "prompt. Take all that is before the answers out of them, or save the dialogues as lists of messages with "
            "role and content"
        )
    if reader.has_prompts:
        return None
    if counts.unused:
        name, seen = next(iter(counts.unused.items()))
        option = "system_column" if is_system(name) else "prompt_column"
        how = "Add a prompt column and set" if is_system(name) and counts.text.n else "Set"
        return (
            f"column {name!r}, {reader.where(seen.first)}: there is no prompt column, so what chosen and rejected "
            f"both begin with would be the prompt, and it does not contain this column's text ({seen.n} such rows). "
            f"{how} {option}={name!r} (--{option} {name}), or remove the column if it is not part of the prompt"
        )
    if counts.text.n == counts.n >= 3 and len(counts.prompts) == 1 and len(counts.same_rows) < counts.n:
        return (
            f"the {reader.split} data set has no prompt column, and chosen and rejected begin alike in all {counts.n} "
            "rows, with the same text: that looks like chance, not like a prompt. Add a prompt column, with '' where "
            "there is no prompt"
        )
    return None


class Note(NamedTuple):
    """A message about a data set."""

    level: int
    text: str


def notes(reader: RowReader, counts: RowCounts, read: Collection[str] = ()) -> Iterator[Note]:
    """What training would otherwise hide, one sentence each. `read` are columns that the objective reads."""
    info, warning = partial(Note, logging.INFO), partial(Note, logging.WARNING)
    n = counts.n
    if reader.prompt_column not in (None, "prompt"):
        yield info(f"column {reader.prompt_column!r} holds the prompts")
    for name, seen in counts.alike.items():
        odd = odd_letters(name) or "its name is written otherwise"
        meant = taken_for(name, reader) or "tools"
        yield warning(
            f"the column {name!a}, which {seen.n} of {n} rows have, is not read as {meant!r}, "
            f"since {odd}: rename it if it is meant as that"
        )
    if same := len(counts.same_rows):
        yield warning(f"{same} of {n} pairs have the same completion twice: they have no gap to learn from")
    for name, seen in counts.blank.items():
        yield warning(
            f"{seen.n} of {n} {name} completions have no text of their own (the first is in row {seen.first}): they "
            "teach whether to say nothing. If that is not intended, drop the rows, for example with dataset.filter"
        )
    for name, seen in counts.spelled.items():
        yield warning(
            f"in {seen.n} of {n} rows column {name!r} holds messages, written as text (the first is row "
            f"{seen.first}), and is read as text"
            + ": to be read as messages, all rows must have them, chosen and rejected alike"
            * (name != reader.system_column)
            + ". If they are messages, save them as lists"
        )
    if 0 < (seen := counts.seem).n == counts.text.n:
        yield warning(
            "chosen and rejected of all text rows begin as messages do, with a role and a content, and are read as "
            f"the text that they are (the first is row {seen.first}): if they are messages, save them as lists"
        )
    if (seen := counts.contradicted).n:
        yield warning(
            f"in {seen.n} of {n} rows the text in column {reader.prompt_column!r} is not what the conversations in "
            f"chosen and rejected begin with (the first is row {seen.first}): the beginning of the conversations is "
            "the prompt"
        )
    if counts.repeats_prompt:
        yield info(
            f"chosen and rejected repeat their prompt in all {counts.prompted} text rows: it is removed from them"
        )
    elif (seen := counts.repeated_within).n and counts.dialogues.n < counts.prompted:
        yield warning(
            f"in {seen.n} of {counts.prompted} text rows, chosen and rejected begin with the same text, "
            f"and their prompt in it (the first is row {seen.first}): all of it counts as part of the completions. "
            "Take it out of them if that is not intended"
        )
    if not counts.repeats_prompt and (seen := counts.repeated).n:
        yield warning(
            f"in {seen.n} of {counts.prompted} text rows, not in all, chosen and rejected begin with their prompt "
            f"(the first is row {seen.first}): there it counts as part of the completions. Remove it from them if "
            "that is not intended"
        )
    if (seen := counts.repeated_once).n > n / 2:
        yield warning(
            f"in {seen.n} of {n} rows only one of chosen and rejected begins with the prompt (the first is row "
            f"{seen.first}): there it counts as part of the completion. Remove it from them if that is not intended"
        )
    if (seen := counts.repeated_alike).n > n / 2:
        yield warning(
            f"in {seen.n} of {n} rows chosen and rejected begin with the prompt, in other line ends, blanks, quotes "
            f"or capitals (the first is row {seen.first}): there it counts as part of the completions. Remove it from "
            "them if that is not intended"
        )
    if 0 < (seen := counts.unprompted).n < counts.text.n:
        yield warning(
            f"in {seen.n} of {counts.text.n} text rows the prompt is empty (the first is row {seen.first}): there the "
            "completions follow nothing. If that is not intended, drop the rows, for example with dataset.filter"
        )
    if (seen := counts.user_turns).n:
        yield warning(
            f"in {seen.n} of {n} rows a completion holds turns of the user (the first is row {seen.first}): their "
            "tokens are scored as if the model had written them. Put earlier turns into the prompt, or end the "
            "completion before them"
        )
    if (seen := counts.user_marks).n:
        yield warning(
            f"in {seen.n} of {n} rows a completion holds {counts.user_mark!r} or the like (the first is row "
            f"{seen.first}): if turns of the user begin with it, their tokens are scored as if the model had written "
            "them. Put earlier turns into the prompt, and end the completion before them"
        )
    if (seen := counts.prefilled).n:
        yield warning(
            f"{seen.n} of {n} prompts end with the assistant's turn (the first is row {seen.first}): the chat "
            "template makes the completion a further turn. To continue the turn, move its text into the completions"
        )
    if (seen := counts.rendered if counts.asking.n <= n / 2 else counts.asking).n:
        yield warning(
            f"in {seen.n} of {n} rows a message of the prompt marks turns with {counts.rendered_mark!r} (the first is "
            f"row {seen.first}): if a chat template has rendered it, it is rendered a second time. Give the messages "
            "as they were before, or prompt, chosen and rejected as text"
        )
    for role, seen in counts.roles.items():
        yield warning(
            f"in {seen.n} of {n} rows a message has the role {role!r} (the first is row {seen.first}): a chat "
            "template that does not know it leaves the message out, or prints the role as it is. If it means one of "
            f"{', '.join(USUAL_ROLES[:4])}, rename it"
        )
    if counts.text.n and (seen := counts.messages).n:
        yield warning(
            f"{counts.text.n} rows are text (the first is row {counts.text.first}) and {seen.n} are messages (the "
            f"first is row {seen.first}): the chat template renders only the messages"
        )
    for name in sorted(_VERDICTS.intersection(reader.columns).difference(read)):
        yield warning(
            f"column {name!r} is not read: whatever it says, chosen is the better completion of every row. If it says "
            "otherwise of some, swap their completions, for example with dataset.map"
        )
    yield from map(warning, unused_notes(counts.beside, n, reader))
    if reader.has_prompts:  # else it is refused
        yield from map(warning, unused_notes(counts.unused, n, reader))
