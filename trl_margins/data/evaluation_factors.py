"""Evaluation factors: the similarity of the two completions of a pair, from 0 (nothing in common) to 1 (equal).

EF of "Gap-Aware Preference Optimization (GaPO)", Table 1, with y_w the chosen and y_l the rejected completion:

    jaccard     |W ∩ L| / |W ∪ L|, the sets of their words
    rouge1, 2   F1 of the words (pairs of neighbouring words) in common, each as often as both have it
    rougeL      F1 of the longest common subsequence of words
    bertscore_* P = mean over tokens of y_l of the largest cosine with a token of y_w; R the other way round; their F1

Words are rouge-score's: lower case, runs of a–z and 0–9. Text in other scripts has none: use BERTScore for it.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from numbers import Real
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value
from datasets.utils import tqdm
from rapidfuzz.distance import LCSseq
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from transformers import AutoConfig

from ..checks import Number
from ..rows import PreferenceRow, RowReader, open_rows
from ..rows.form import COMPLETIONS
from ..rows.messages import Part, text_of
from ..rows.scores import refuse_bad_values
from ..rows.tokens import read_batch
from .formats import one_split, with_format_of

logger = logging.getLogger(__name__)

BERTSCORE_METRICS = ("bertscore_precision", "bertscore_recall", "bertscore_f1")  # in bert-score's order
METRICS: tuple[str, ...] = ("jaccard", "rouge1", "rouge2", "rougeL", *BERTSCORE_METRICS)
PAIRS_PER_CALL = 1024  # bert-score keeps the embeddings of a call: 4 GB for 2,048 texts of 512 tokens, 1,024 wide
CACHE_VERSION = 2  # part of the cache key: raise it whenever a value may change

_SPACED = bytes(c if chr(c) in "abcdefghijklmnopqrstuvwxyz0123456789" else 32 for c in range(256))
_OF_WORDS = ascii_letters + digits


def compute(
    chosen: Sequence[str],
    rejected: Sequence[str],
    metric: str = "rougeL",
    *,
    encoder: str | None = None,
    num_layers: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
) -> list[float]:
    """EF of each pair, in [0, 1].

    ROUGE is rouge-score's `fmeasure` without a stemmer, to the last bit, with the chosen completion as the target;
    texts without words have 0. Jaccard: 1 if neither text has a word, 0 if one has none. BERTScore is bert-score's
    without baseline rescaling; an empty text has 0, and a text longer than the encoder's context is truncated.
    bert-score counts a token whose best cosine is negative as 0 where a batch is padded, so the values of very
    different completions may change in the fourth digit with their batch.

    Args:
        chosen, rejected: the completions, `[N]` each.
        metric: one of `METRICS`.
        encoder: for BERTScore, a folder or Hub id of a model that `AutoModel` loads.
        num_layers: use the token embeddings after this layer; by default bert-score's choice if it knows the encoder
            by its id, else the last layer.
        batch_size: texts per forward pass of the encoder; by default 8 on a CPU, else 64.
        device: of the encoder; CUDA if available, else the CPU.

    Raises:
        ValueError: an unknown metric, lists of different length, something that is not a string, no encoder.
        ImportError: BERTScore without bert-score.
    """
    return _compute(chosen, rejected, [metric], encoder, num_layers, batch_size, device)[metric]


def _compute(
    chosen: Sequence[str],
    rejected: Sequence[str],
    metrics: Sequence[str],
    encoder: str | None = None,
    num_layers: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
) -> dict[str, list[float]]:
    """Metric → `compute` of it. All BERTScores are from the same embeddings."""
    for metric in metrics:
        _check_metric(metric)
    if len(chosen) != len(rejected):
        raise ValueError(f"{len(chosen)} chosen and {len(rejected)} rejected completions: each pair needs one of each")
    for name, texts in (("chosen", chosen), ("rejected", rejected)):
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name}, row {row}: {text!r} is not a string")
    semantic = [metric for metric in metrics if metric in BERTSCORE_METRICS]
    values = _bertscore(chosen, rejected, semantic, encoder, num_layers, batch_size, device) if semantic else {}
    if lexical := [metric for metric in metrics if metric not in BERTSCORE_METRICS]:
        words = [(_words(w), _words(r)) for w, r in zip(chosen, rejected, strict=True)]
        values |= {metric: [_LEXICAL[metric](w, r) for w, r in words] for metric in lexical}
    return values


def completion_texts(row: PreferenceRow, implicit: bool = False) -> tuple[str, str]:
    """The texts of both completions of a row, for comparison: of messages, only the assistant's.

    If the prompt is `implicit`, the common beginning of both, a word that it cuts in two counts as a whole.
    """
    chosen, rejected = (_assistant_text(part) for part in row.completions)
    # TRL leaves a common space to the completions: then no word is cut
    if implicit and isinstance(row.prompt, str) and chosen != rejected and chosen[:1] != " ":
        cut = row.prompt[len(row.prompt.rstrip(_OF_WORDS)) :]
        chosen, rejected = cut + chosen, cut + rejected
    return chosen, rejected


def _assistant_text(part: Part) -> str:
    return part if isinstance(part, str) else text_of([m for m in part if m["role"] == "assistant"])


def add_evaluation_factor(
    dataset: Dataset | DatasetDict,
    metric: str = "rougeL",
    column: str = "evaluation_factor",
    *,
    num_proc: int | None = None,
    encoder: str | None = None,
    num_layers: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    reader: RowReader | None = None,
) -> Dataset | DatasetDict:
    """The data set, or each of its splits, with EF as a float64 column; takes every row form that TRL takes.

    `Dataset.map` caches the result, so a second call with the same arguments computes nothing (a data set that was
    made in memory has no cache). For BERTScore one process takes all rows at once, because bert-score encodes a text
    that occurs in several pairs once per call.

    Args:
        metric, encoder, num_layers, batch_size, device: as for `compute`.
        column: name of the new column.
        num_proc: processes, not for BERTScore.
        overwrite: replace a column of that name.
        reader: reads the rows; by default, one for this set.

    Raises:
        ValueError: as `compute`, with the row; columns that are missing, or there already.
        TypeError: a streamed data set.
    """
    _check_metric(metric)
    options: dict[str, Any] = {
        "encoder": encoder,
        "num_layers": num_layers,
        "batch_size": batch_size,
        "device": device,
    }
    if isinstance(dataset, DatasetDict):
        shared: dict[str, Any] = {"num_proc": num_proc, "overwrite": overwrite, **options}
        return DatasetDict({n: add_evaluation_factor(s, metric, column, **shared) for n, s in dataset.items()})
    dataset = one_split(dataset, "add_evaluation_factor")
    if column in (*COMPLETIONS, *(["prompt"] if reader is None else reader.needed)):
        raise ValueError(
            f"{column!r} is a column of the pairs themselves: give column (trl-margins score --column) another name"
        )
    if column in dataset.column_names:
        if not overwrite:
            raise ValueError(
                f"the data set has a column {column!r} already: overwrite=True (trl-margins score --overwrite true) "
                "computes it anew"
            )
        dataset = dataset.remove_columns(column)
    return add_columns(dataset, {column: metric}, reader, num_proc, **options)


def add_columns(
    dataset: Dataset,
    columns: Mapping[str, str],
    reader: RowReader | None = None,
    num_proc: int | None = None,
    **options: Any,
) -> Dataset:
    """One split with several evaluation factors, in one pass over its texts.

    Args:
        columns: new column → metric.
        options: `encoder`, `num_layers`, `batch_size` and `device`, as for `compute`.
    """
    features = Features({**dataset.features, **dict.fromkeys(columns, Value("float64"))})
    if not len(dataset):  # map() does not look at an empty set
        return Dataset.from_dict({name: [] for name in features}, features=features)
    whole = not set(columns.values()).isdisjoint(BERTSCORE_METRICS)
    reader = reader or open_rows(dataset, "given").reader
    scored = dataset.with_format(None).map(
        _score_rows,
        batched=True,
        batch_size=None if whole else 1000,
        num_proc=None if whole else num_proc,
        with_indices=True,
        fn_kwargs={
            "reader": reader,
            "columns": dict(columns),
            "options": options if whole else {},
            "cache_key": (CACHE_VERSION, _stamp(options.get("encoder")) if whole else None),
        },
        features=features,
        desc=f"{next(iter(columns.values())) if len(columns) == 1 else 'Similarity'} of chosen and rejected",
    )
    of_words = [column for column, metric in columns.items() if metric not in BERTSCORE_METRICS]
    found = [check_evaluation_factors(scored[column], column, reader.split) for column in of_words]
    if any(few_words(each.n, each.n_zero, each.n_one) is None for each in found):
        _warn_of_other_letters(dataset, reader)
        for column in of_words:
            _warn_of_no_words(scored, column, reader)
    return with_format_of(scored, dataset, *columns)


def _warn_of_other_letters(dataset: Dataset, reader: RowReader) -> None:
    """Where `few_words` says nothing: words that are left between letters that the metrics of words do not know."""
    some = range(0, len(dataset), max(len(dataset) // _LOOKED_AT, 1))
    rows = read_batch(reader, dataset.with_format(None).select(some)[:], [*some])
    texts = "".join(text for row in rows for text in completion_texts(row, implicit=reader.prompt_column is None))
    texts = unicodedata.normalize("NFC", texts)  # a letter and its accent are one
    letters = len(_LETTER.findall(texts))
    others = letters - len(_KNOWN.findall(texts))
    if others > _MANY * letters:
        logger.warning(
            "%s: %.0f %% of the letters in the completions are none of a–z or 0–9, and the evaluation factor compares "
            "what is left of the words without them; BERTScore may be the better metric",
            *(reader.split, 100 * others / letters),
        )


def _warn_of_no_words(scored: Dataset, column: str, reader: RowReader) -> None:
    """Of pairs that a metric takes for equal since neither text has a word that it knows."""
    equal = np.flatnonzero(np.asarray(scored[column][:]) == 1)[:_LOOKED_AT].tolist()
    rows = read_batch(reader, scored.with_format(None).select(equal)[:], equal)
    texts = [completion_texts(row, implicit=reader.prompt_column is None) for row in rows]
    found = [i for i, (one, other) in zip(equal, texts, strict=True) if one != other and not _words(one + other)]
    if found:
        logger.warning(
            "%s: %d of %d pairs have the evaluation factor 1, as if both texts were equal, because neither has a word "
            "made of a–z or 0–9 (the first is row %d); BERTScore may be the better metric",
            *(reader.split, len(found), len(scored), found[0]),
        )


def _score_rows(
    batch: Mapping[str, list[Any]],
    numbers: list[int],
    reader: RowReader,
    columns: dict[str, str],
    options: dict[str, Any],
    cache_key: Any,  # only part of the fingerprint
) -> dict[str, list[float]]:
    rows = read_batch(reader, batch, numbers)
    texts = [completion_texts(row, implicit=reader.prompt_column is None) for row in rows]
    values = _compute([w for w, _ in texts], [r for _, r in texts], list(columns.values()), **options)
    return {column: values[metric] for column, metric in columns.items()}


def _stamp(encoder: str | None) -> list[tuple[str, int, int]] | None:
    """Changes when another encoder is saved into the same folder."""
    folder = Path(encoder or "").expanduser()
    if not encoder or not folder.is_dir():
        return None
    return sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())


_FEW = 0.05  # of pairs
_MANY = 0.2  # of letters: of the languages with accents, Vietnamese alone has as many
_LETTER, _KNOWN = re.compile(r"[^\W_]"), re.compile("[a-zA-Z0-9]")
_LOOKED_AT = 1000  # rows


@dataclass(frozen=True)
class EvaluationFactorSummary:
    """Counts over the evaluation factors of one data set."""

    n: int
    n_zero: int  # their log is infinite
    n_one: int  # equal completions, as far as the metric sees
    mean: float  # NaN without pairs


def few_words(n: int, n_zero: int, n_one: int) -> str | None:
    """What factors of words cannot tell apart, in words; None if that is little.

    Args:
        n: pairs.
        n_zero, n_one: those with the factor 0 and 1.
    """
    zeros, ones = (f"{part} of {n} pair{'s' * (n != 1)} ({part / max(n, 1):.1%})" for part in (n_zero, n_one))
    better = "BERTScore may be the better metric"
    if n_zero > _FEW * n:
        return (
            f"the evaluation factor is 0 in {zeros}: gap-aware cannot tell apart completions that share no word made "
            f"of a–z or 0–9; {better}"
        )
    if n_one > _FEW * n:
        return (
            f"the evaluation factor is 1 in {ones}: gap-aware takes completions for equal that have the same words, "
            f"or no word made of a–z or 0–9; {better}"
        )
    return None


def warn_of_few_words(found: EvaluationFactorSummary, metric: str, split: str) -> None:
    """Logs what `few_words` says of factors that are of words, or may be."""
    if metric not in BERTSCORE_METRICS and (said := few_words(found.n, found.n_zero, found.n_one)):
        logger.warning("%s: %s", split, said)


def check_evaluation_factors(values: Any, column: str, split: str) -> EvaluationFactorSummary:
    """Checks a column of evaluation factors, `[N]`, and counts its zeros and ones.

    Raises a ScoreError for None, NaN, something that is not a number, or is outside [0, 1].
    """
    values = values.tolist() if isinstance(values, np.ndarray) else values[:]  # a column of a data set is lazy
    values = [float(value) if isinstance(value, Decimal) else value for value in values]
    refuse_bad_values(values, _problem, column, split, "evaluation factor")
    array = np.array(values, float)
    mean = float(array.mean()) if len(array) else float("nan")
    return EvaluationFactorSummary(len(array), int((array == 0).sum()), int((array == 1).sum()), mean)


def _problem(value: Any) -> str | None:
    again = "compute the column with trl-margins score or add_evaluation_factor"
    if value is None:
        return f"is None: drop the row, or {again}"
    if isinstance(value, bool) or not isinstance(value, Real):
        return f"is not a number: {again}"
    if math.isnan(value):
        return f"is NaN: drop the row, or {again}"
    return None if 0 <= float(value) <= 1 else f"is outside [0, 1]: divide percentages by 100, or {again}"


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")


def _words(text: str) -> list[bytes]:
    """rouge-score's tokens. Translating bytes is twice as fast as its regular expressions."""
    return text.lower().encode("ascii", "replace").translate(_SPACED).split()


def _f1(common: int, n_chosen: int, n_rejected: int) -> float:
    """In the order of rouge-score's arithmetic, for the same last bit."""
    precision, recall = common / max(n_rejected, 1), common / max(n_chosen, 1)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _jaccard(chosen: list[bytes], rejected: list[bytes]) -> float:
    words, others = set(chosen), set(rejected)
    return len(words & others) / len(words | others) if words or others else 1.0


def _rouge_1(chosen: Sequence[Any], rejected: Sequence[Any]) -> float:
    return _f1((Counter(chosen) & Counter(rejected)).total(), len(chosen), len(rejected))


def _rouge_l(chosen: list[bytes], rejected: list[bytes]) -> float:
    # rapidfuzz compares 64-bit hashes of the words
    return _f1(LCSseq.similarity(chosen, rejected), len(chosen), len(rejected))


_LEXICAL: dict[str, Callable[[list[bytes], list[bytes]], float]] = {
    "jaccard": _jaccard,
    "rouge1": _rouge_1,
    "rouge2": lambda chosen, rejected: _rouge_1(list(pairwise(chosen)), list(pairwise(rejected))),
    "rougeL": _rouge_l,
}


def _bertscore(
    chosen: Sequence[str],
    rejected: Sequence[str],
    metrics: Sequence[str],
    encoder: str | None,
    num_layers: int | None,
    batch_size: int | None,
    device: str | None,
) -> dict[str, list[float]]:
    named = metrics[0] if len(metrics) == 1 else "bertscore"
    scorer = _scorer(named, encoder, num_layers, device)
    if batch_size is not None:
        Number(least=1, whole=True).check("batch_size", batch_size)
    else:  # on a CPU, larger batches only add padding
        batch_size = 8 if str(scorer.device) == "cpu" else 64
    # bert-score 0.3.13 also gives empty texts 0, but with a tokenizer method that transformers 5 has removed
    rows = np.array([i for i, pair in enumerate(zip(chosen, rejected, strict=True)) if all(map(str.strip, pair))], int)
    values = np.zeros((len(metrics), len(chosen)))
    with tqdm(total=len(chosen), initial=len(chosen) - len(rows), desc=named, unit="pair") as bar:
        for group in _groups([chosen[i] for i in rows], [rejected[i] for i in rows], PAIRS_PER_CALL):
            at = rows[group]
            scores = scorer.score([rejected[i] for i in at], [chosen[i] for i in at], batch_size=batch_size)
            for of_metric, metric in zip(values, metrics, strict=True):
                of_metric[at] = scores[BERTSCORE_METRICS.index(metric)].double().numpy()
            bar.update(len(at))
    for metric, of_metric in zip(metrics, values, strict=True):
        if np.isnan(of_metric).any():
            raise ValueError(
                f"{metric} of row {int(np.isnan(of_metric).argmax())} is NaN with the encoder {encoder!r}"
            )
        if n_negative := int((of_metric < 0).sum()):
            logger.warning(
                "%s: %d of %d pairs have a negative cosine and count as 0", metric, n_negative, len(of_metric)
            )
    clipped = np.clip(values, 0.0, 1.0).tolist()  # a cosine of 1 may be rounded up
    return dict(zip(metrics, clipped, strict=True))


def _scorer(metric: str, encoder: str | None, num_layers: int | None, device: str | None) -> Any:
    """bert-score's scorer, with what it needs to work under transformers 5."""
    if not encoder:
        raise ValueError(
            f"{metric} needs an encoder: a folder or Hub id. Set gap_aware_encoder='roberta-large', for example "
            "(trl-margins train --gap_aware_encoder roberta-large), or encoder='roberta-large' of "
            "add_evaluation_factor (trl-margins score --encoder roberta-large)"
        )
    try:
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
    except ImportError as error:
        raise ImportError(f"{metric} needs bert-score ({error}): pip install 'trl-margins[bertscore]'") from error
    path = str(Path(encoder).expanduser()) if Path(encoder).expanduser().is_dir() else encoder
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # without it, transformers may prompt
    except (OSError, ValueError) as error:
        raise ValueError(f"the encoder {encoder!r} cannot be loaded: {' '.join(str(error).split())}") from error
    if "t5" in path and "t5" not in config.model_type:
        raise ValueError(
            f"bert-score loads as a T5 whatever has 't5' in its name, and {path!r} is a {config.model_type}: "
            "use a path without 't5', for example a link or a relative path"
        )
    if num_layers is None:
        num_layers = model2layers.get(path, config.num_hidden_layers)
    if not 0 <= num_layers <= config.num_hidden_layers:
        raise ValueError(f"num_layers={num_layers}: the encoder {encoder!r} has {config.num_hidden_layers} layers")
    scorer = BERTScorer(path, num_layers, device=device)
    scorer._model.float()  # transformers 5 keeps the dtype of the file; bert-score needs fp32
    if scorer._tokenizer.model_max_length > 1 << 30:  # means no limit, and overflows the fast tokenizers' integers
        # two fewer than positions, as RoBERTa's start at 2
        scorer._tokenizer.model_max_length = getattr(config, "max_position_embeddings", 514) - 2
    return scorer


def _groups(chosen: Sequence[str], rejected: Sequence[str], size: int) -> Iterator[np.ndarray]:
    """All rows in groups of at most `size`; rows connected by shared texts stay in one group, if they fit.

    So each text is encoded once. The longest come first: memory runs out at once or never.
    """
    if not len(chosen):
        return
    ids: dict[str, int] = {}
    nodes = np.array([[ids.setdefault(text, len(ids)) for text in side] for side in (chosen, rejected)])
    graph = coo_matrix((np.ones(len(chosen)), tuple(nodes)), shape=(len(ids), len(ids)))
    component = connected_components(graph, directed=False)[1][nodes[0]]
    length = np.array([max(map(len, pair)) for pair in zip(chosen, rejected, strict=True)])
    longest = np.zeros(len(ids), int)
    np.maximum.at(longest, component, length)
    order = np.lexsort((-length, component, -longest[component]))
    start, ends = 0, np.flatnonzero(np.diff(component[order], append=-1)) + 1
    for last, end in pairwise((0, *ends)):
        if start < last and end - start > size:
            yield order[start:last]
            start = last
        while end - start > size:
            yield order[start : start + size]
            start += size
    yield order[start:]
