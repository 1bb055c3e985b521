"""From prompts to answers: tokens, the end of a turn, text, and the rows of the file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from tqdm.auto import tqdm

from ..rows import PreferenceRow, RowError, tokenize
from ..rows.limited import limited
from ..rows.tokenized import AT_FIRST, log_notes, log_unread
from ..rows.tokens import RowTokens
from .local import Answers
from .sampling import Prompt, Sampling
from .store import Store, key_of

logger = logging.getLogger(__name__)

Engine = Callable[..., Answers]  # of `prompts`, `sampling`, and `stop`, the tokens that end an answer

_PROBE = "an answer"


@dataclass(frozen=True)
class Answering:
    """A model that answers, and what belongs to it.

    Attributes:
        name: of the model, for the column `models`.
        tokenizer: its tokenizer.
        engine: computes the answers.
        end: tokens that end an answer besides the tokenizer's, such as those of the model's generation config.
        limit: longest prompt and answer that the model takes, if there is a limit.
    """

    name: str
    tokenizer: Any
    engine: Engine
    end: Sequence[int] = ()
    limit: int | None = None

    def stop(self, rows: Sequence[PreferenceRow]) -> list[int]:
        """The tokens that end an answer."""
        ends = {*self.end, self.tokenizer.eos_token_id} - {None}
        if any(row.is_conversational for row in rows):
            ends |= set(turn_end(self.tokenizer))
        return sorted(ends)


def answer(
    rows: Sequence[PreferenceRow],
    model: Answering,
    sampling: Sampling,
    store: Store,
    split: str = "train",
    shard: tuple[int, int] = (1, 1),
) -> list[dict[str, Any]]:
    """Answers the prompts of these rows that have no answers in the file yet, and writes the file.

    Args:
        rows: prompts, of which equal ones count once.
        model: who answers.
        sampling: how many answers, and how they are drawn.
        store: the file.
        split: name of the data set in errors and logs.
        shard: (I, N) answers every N-th of the different prompts, from the I-th.

    Returns:
        One row per prompt, in the order of the data set: `prompt`, `responses`, `models`, `truncated` (an answer was
        cut at `max_new_tokens`), and `tools` or `chat_template_kwargs`, if its row had any.

    Raises:
        RowError: the chat template refuses a prompt.
        ValueError: the file has prompts that these rows do not.
    """
    unique: dict[str, tuple[int, PreferenceRow]] = {}
    for i, row in enumerate(rows):
        unique.setdefault(key_of(prompt_columns(row)), (i, row))
    if merged := len(rows) - len(unique):
        logger.info("%s: %d of %d prompts occur before, and are answered once", split, merged, len(rows))
    unique = dict(islice(unique.items(), shard[0] - 1, None, shard[1]))
    numbers, wanted = [i for i, _ in unique.values()], [row for _, row in unique.values()]
    tokens = tokenize(wanted, model.tokenizer, lambda i: f"row {numbers[i]} of the {split} data set")
    log_unread(split, wanted, model.tokenizer, numbers)
    first = [replace(row, completions=[type(row.prompt)()]) for row in wanted[:AT_FIRST]]  # with no answer yet
    whole = [RowTokens([*each.prompt, *each.tail], [[]]) for each in tokens[:AT_FIRST]]
    log_notes(split, first, whole, model.tokenizer, numbers, only_reads=True)
    prompts = {
        key: Prompt(ids := [*each.prompt, *each.tail], min(sampling.max_new_tokens, (model.limit or 2**31) - len(ids)))
        for key, each in zip(unique, tokens, strict=True)
    }
    if long := [key for key, prompt in prompts.items() if prompt.room < 1]:
        logger.warning(
            "%s: %d of %d prompts leave no room for an answer in the %s tokens that the model takes, the first is row "
            "%d: they are left out",
            *(split, len(long), len(unique), model.limit, unique[long[0]][0]),
        )
    if empty := [key for key, prompt in prompts.items() if not prompt.ids]:
        raise RowError(f"row {unique[empty[0]][0]} of the {split} data set: its prompt has no tokens: drop it")
    order = [key for key, prompt in prompts.items() if prompt.room > 0]
    store.check_all_of(order)
    todo = [key for key in order if key not in store.rows]
    stop = model.stop(wanted)
    logger.info("an answer ends with %s", model.tokenizer.convert_ids_to_tokens(stop))
    progress = tqdm(
        total=len(order) * sampling.n, initial=(len(order) - len(todo)) * sampling.n, desc="Answers", unit="answer"
    )
    with progress:
        asked = {"prompts": [prompts[key] for key in todo], "sampling": sampling, "stop": stop}
        for i, answers in model.engine(**asked) if todo else ():
            row = unique[todo[i]][1]
            store.add(
                {
                    **prompt_columns(row),
                    "responses": [text_of_answer(model.tokenizer, row, prompts[todo[i]].ids, a) for a in answers],
                    "models": [model.name] * len(answers),
                    "truncated": [not each or each[-1] not in stop for each in answers],
                }
            )
            progress.update(len(answers))
    made = store.finish(order)
    _log_counts(made, sampling)
    return made


def prompt_columns(row: PreferenceRow) -> dict[str, Any]:
    """The columns that hold a row's prompt."""
    tools = row.template.get("tools")
    others = {name: value for name, value in row.template.items() if name != "tools"}
    return {
        "prompt": row.prompt,
        **({"tools": tools} if tools else {}),
        **({"chat_template_kwargs": others} if others else {}),
    }


def turn_end(tokenizer: Any) -> list[int]:
    """The token that ends the assistant's turn in the chat template, if it has one."""
    user, said = {"role": "user", "content": "a question"}, {"role": "assistant", "content": _PROBE}
    with limited():
        text = tokenizer.apply_chat_template([user, said], tokenize=False)
    behind = text.rpartition(_PROBE)[2]
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [id for id in ids if id in special][:1]


def text_of_answer(tokenizer: Any, row: PreferenceRow, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text of an answer, with all its white space and without special tokens.

    Behind a prompt in text it begins where the prompt ends: some tokenizers write the space in front of a first word
    only where something is before it. A message begins where the chat template puts it.
    """

    def decoded(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    if row.is_conversational:
        return decoded(answer)
    before, whole = decoded(prompt), decoded([*prompt, *answer])
    return whole.removeprefix(before) if whole.startswith(before) else decoded(answer)


def _log_counts(rows: Sequence[dict[str, Any]], sampling: Sampling) -> None:
    answers = [text for row in rows for text in row["responses"]]
    cut = sum(sum(row["truncated"]) for row in rows)
    empty = sum(not text.strip() for text in answers)
    alike = sum(len(set(row["responses"])) == 1 < len(row["responses"]) for row in rows)
    logger.info("%d answers to %d prompts", len(answers), len(rows))
    for n, what in ((cut, f"are cut at {sampling.max_new_tokens} tokens or the model's limit"), (empty, "are empty")):
        if n:
            logger.warning("%d of %d answers %s", n, len(answers), what)
    if alike:
        logger.warning("%d of %d prompts have the same answer %d times", alike, len(rows), sampling.n)
