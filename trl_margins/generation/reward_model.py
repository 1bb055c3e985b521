"""Scores answers with a reward model: a sequence classifier with one label."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..forward.head import merged
from ..forward.positions import positions_of
from ..rows import PreferenceRow, RowError, open_rows, tokenize
from ..rows.form import refuse_images
from ..rows.list_forms import list_form
from ..rows.lists import ScoredLists
from ..rows.messages import Part, says, text_of
from ..rows.tokenized import log_notes, log_unread
from ..rows.turns import split_turns, unsplit_note

logger = logging.getLogger(__name__)

Encoded = Mapping[str, list[int]]  # a prompt with an answer: `input_ids`, and `token_type_ids` where there are any


def load_reward_model(path: str, **kwargs: Any) -> Any:
    """The sequence classifier of a folder or a Hub id, which may be an adapter's.

    Raises:
        ValueError: its head has no weights, so that its scores would be random.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.models.llama import modeling_llama

    if (Path(path) / "adapter_config.json").is_file():
        return _load_adapter(path, **kwargs)
    # the code of ArmoRM and of models built on it imports this text, which transformers no longer has
    vars(modeling_llama).setdefault("LLAMA_INPUTS_DOCSTRING", "")
    model, report = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True, **kwargs)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(_no_head(path, missing))
    return model


def _load_adapter(path: str, **kwargs: Any) -> Any:
    from peft import AutoPeftModelForSequenceClassification
    from peft.utils import load_peft_weights

    heads = {
        name: weight
        for name, weight in load_peft_weights(path, device="cpu").items()
        if name.endswith(("score.weight", "classifier.weight", "out_proj.weight"))
    }
    if not heads:
        raise ValueError(_no_head(path, ["score.weight"]))
    labels = next(iter(heads.values())).shape[0]
    return merged(AutoPeftModelForSequenceClassification.from_pretrained(path, num_labels=labels, **kwargs), path)


def _no_head(path: str, missing: Sequence[str]) -> str:
    return (
        f"{path} is no reward model: it has no weights for {', '.join(missing[:3])}, so its scores would be random. "
        "Name a model that was trained to score answers, for example with TRL's RewardTrainer"
    )


def rows_to_score(
    dataset: Dataset, split: str, prompt_column: str | None = None, system_column: str | None = None
) -> tuple[list[PreferenceRow], bool]:
    """The prompt and the answers of every row, and whether the rows are lists; else they are pairs.

    Lists beside pairs, as in SimPO's sets, count as for `make_pairs`.

    Raises:
        RowError: a row that cannot be read, or answers that are neither pairs nor in a list.
    """
    columns = dataset.column_names
    refuse_images(dataset, f"the {split} data set: answers are scored")
    are_pairs = {"chosen", "rejected"} <= set(columns)
    form = list_form(columns, None, prompt_column, scored=are_pairs)
    in_lists = form is not None and form.kind in ("columns", "structs")
    if form is None or (are_pairs and not in_lists):
        return list(open_rows(dataset, split, prompt_column, system_column)), False
    if not in_lists:
        answers = [f"row[{name!r}]" for name in form.responses]
        prompt = ""
        if form.prompt is None:  # conversations
            prompt, answers = f"'prompt': {answers[0]}[:-1], ", [f"{answer}[-1:]" for answer in answers]
        raise RowError(
            f"the {split} data set has its answers in {' and '.join(map(repr, form.responses))}, and a reward model "
            f"scores pairs, or lists of answers: make lists with dataset.map(lambda row: {{{prompt}'responses': "
            f"[{', '.join(answers)}]}})"
        )
    if are_pairs:
        logger.warning(
            "%s: there are lists of answers (%s) beside chosen and rejected: the lists get scores, and chosen and "
            "rejected stay as they are. To score these, remove the column %s; for pairs by the new scores, use "
            "trl-margins pairs",
            *(split, form.responses[0], form.responses[0]),
        )
    lists = ScoredLists.of(*(dataset, f"the {split} data set", None, prompt_column, system_column), scored=False)
    return [PreferenceRow(each.prompt, each.responses, each.template) for each in lists], True


def tokens_to_score(rows: Sequence[PreferenceRow], tokenizer: Any, split: str) -> list[list[Encoded]]:
    """Each prompt with each of its answers, as the reward model reads them.

    By its chat template, if it has one. Else text is tokenized with an end token, as TRL's RewardTrainer does; and a
    tokenizer that separates two texts gets them as two.
    """
    if _separates(tokenizer):
        if several := sum(row.is_conversational and len(row.prompt) > 1 for row in rows):
            logger.warning(
                "%s: %d of %d prompts have several messages, and the reward model's tokenizer has no chat template: "
                "it gets their texts, one line each, without their roles",
                *(split, several, len(rows)),
            )
        two = iter(_as_two(tokenizer, [(row, answer) for row in rows for answer in row.completions]))
        return [[next(two) for _ in row.completions] for row in rows]
    if tokenizer.chat_template is not None:
        were_text = {i for i, row in enumerate(rows) if not row.is_conversational}
        rows = [_as_chat(row) for row in rows]
        if note := unsplit_note((row.prompt, i) for i, row in enumerate(rows) if i in were_text):
            logger.warning("%s: %s", split, note)
    elif any(row.is_conversational for row in rows):
        raise ValueError(
            f"{split} has messages, and the reward model's tokenizer has no chat template to render them: save one in "
            "its folder as chat_template.jinja, or turn the messages into text"
        )
    found = tokenize(rows, tokenizer, lambda i: f"row {i} of {split}")
    log_unread(split, rows, tokenizer)
    log_notes(split, rows, found, tokenizer, only_reads=True)
    return [[{"input_ids": each.prompt + completion} for completion in each.completions] for each in found]


def cut_tokens(
    tokens: Sequence[Sequence[Encoded]], rows: Sequence[PreferenceRow], tokenizer: Any, max_length: int | None
) -> list[list[Encoded]]:
    """Those that are too long are cut at their end; of two texts the longer one is, as transformers does it."""
    made = [list(some) for some in tokens]
    long = [
        (i, k)
        for i, some in enumerate(tokens)
        for k, each in enumerate(some)
        if max_length is not None and len(each["input_ids"]) > max_length
    ]
    if not long:
        return made
    logger.warning(
        "%d of %d answers are cut, with their prompts, at %d tokens (--max_length)",
        *(len(long), sum(map(len, tokens)), max_length),
    )
    if _separates(tokenizer):
        pairs = [(rows[i], rows[i].completions[k]) for i, k in long]
        cut = _as_two(tokenizer, pairs, truncation=True, max_length=max_length)
    else:
        cut = [{name: ids[:max_length] for name, ids in tokens[i][k].items()} for i, k in long]
    for (i, k), each in zip(long, cut, strict=True):
        made[i][k] = each
    return made


def longest_input(model: Any, tokenizer: Any, asked: int | None = None) -> int | None:
    """The number of tokens asked for, else what model and tokenizer take; None where neither has a limit.

    Raises:
        ValueError: the model has fewer positions than were asked for.
    """
    positions = positions_of(model)
    if asked is not None:
        if positions is not None and asked > positions:
            raise ValueError(
                f"max_length must be at most {positions}, for which the reward model has positions; it is {asked}"
            )
        return asked
    said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # one without a limit may say -1 or a huge number
    return min((n for n in (positions, said, tokenizer.model_max_length) if n and 0 < n < 2**31), default=None)


def _separates(tokenizer: Any) -> bool:
    """Whether prompt and answer are two texts for it."""
    return tokenizer.chat_template is None and tokenizer.sep_token is not None


def _as_two(tokenizer: Any, pairs: Sequence[tuple[PreferenceRow, Part]], **options: Any) -> list[Encoded]:
    if not pairs:
        return []
    texts = [[text_of(row.prompt), text_of(answer)] for row, answer in pairs]
    made = tokenizer(texts, return_attention_mask=False, verbose=False, **options)
    return [dict(zip(made, columns, strict=True)) for columns in zip(*made.values(), strict=True)]


def _as_chat(row: PreferenceRow) -> PreferenceRow:
    if not isinstance(row.prompt, str):
        return row
    prompt, answers = split_turns(row.prompt, [*map(text_of, row.completions)])
    return replace(row, prompt=prompt if row.prompt else [], completions=[says("assistant", each) for each in answers])


@torch.no_grad()
def reward_scores(
    model: Any,
    tokens: Sequence[Sequence[Encoded]],
    batch_size: int = 16,
    label: int | None = None,
    some: Iterable[int] | None = None,
) -> Iterator[tuple[int, list[float]]]:
    """Scores in an order of their own, rows of similar length together.

    A score does not depend on its batch but for rounding: rows are padded on the right, where no causal model looks
    (XLNet's on the left), and the score is read where the model reads it for one row alone.

    Args:
        model: a sequence classifier.
        tokens: [N] of [k] prompts with an answer.
        batch_size: answers per forward pass.
        label: which of several labels is the score.
        some: the numbers of the rows to score; all by default.

    Yields:
        The number of a row, and the scores of its k answers.

    Raises:
        ValueError: several labels without `label`, a `label` that does not exist, or a score that is not a number.
    """
    model.eval()
    lengths = [[len(each["input_ids"]) for each in row] for row in tokens]
    order = sorted(range(len(tokens)) if some is None else some, key=lambda i: -max(lengths[i], default=0))
    with tqdm(total=sum(len(tokens[i]) for i in order), desc="Scores", unit="answer") as progress:
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            answers = sorted(
                ((i, k) for i in rows for k in range(len(tokens[i]))), key=lambda at: -lengths[at[0]][at[1]]
            )
            found: dict[tuple[int, int], float] = {}
            for first in range(0, len(answers), batch_size):
                batch = answers[first : first + batch_size]
                scores = _scores(model, [tokens[i][k] for i, k in batch], label)
                found.update(zip(batch, scores, strict=True))
                progress.update(len(batch))
            for i in rows:
                scores = [found[i, k] for k in range(len(tokens[i]))]
                if any(score != score or abs(score) == float("inf") for score in scores):
                    raise ValueError(
                        f"the reward model scores the answers of row {i} with {scores}: try another precision "
                        "(--dtype float32), or drop the row"
                    )
                yield i, scores


def _scores(model: Any, rows: Sequence[Encoded], label: int | None) -> list[float]:
    config = model.config.get_text_config()
    own, pad = config.pad_token_id, config.pad_token_id
    if pad is None:  # the model reads the score at the last token, or, of a batch, in front of the padding
        used = {id for row in rows for id in row["input_ids"]}
        pad = next((id for id in range(config.vocab_size) if id not in used), None)
    if pad is None and len(rows) > 1:
        return [score for row in rows for score in _scores(model, [row], label)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
    if "token_type_ids" not in signature(model.forward).parameters:  # DistilBERT's, whose tokenizer may be BERT's
        columns.pop("token_type_ids", None)
    width = max(map(len, columns["input_ids"]))
    reads_last = getattr(config, "summary_type", None) == "last"  # XLNet, whose positions are relative

    def padded(ids: list[int], padding: int) -> list[int]:
        more = [padding] * (width - len(ids))
        return [*more, *ids] if reads_last else [*ids, *more]

    inputs = {
        name: torch.tensor([padded(ids, pad or 0 if name == "input_ids" else 0) for ids in lists], device=model.device)
        for name, lists in columns.items()
    }
    config.pad_token_id = pad if len(rows) > 1 else own
    try:
        made = model(**inputs)
    finally:
        config.pad_token_id = own
    return _one_label(made, label).float().tolist()


def _one_label(made: Any, label: int | None) -> Tensor:
    score: Tensor = made.score if getattr(made, "score", None) is not None else made.logits
    if score.dim() == 1:
        return score
    labels = score.shape[-1]
    if label is None and labels > 1:
        raise ValueError(
            f"the reward model has {labels} labels: say which of them is the score with reward_label (--reward_label, "
            f"from 0 to {labels - 1})"
        )
    if label is not None and label >= labels:
        raise ValueError(
            f"reward_label must be below {labels}, the number of the reward model's labels; it is {label}"
        )
    return score[:, label or 0]
