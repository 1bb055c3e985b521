"""The layout of the shared-prompt forward pass: [prompt | completion 1 | … | completion k] in place of k rows, with as
many prompts per row as leave the least padding.

It is built on the CPU, in the collator: looking up tokens on an accelerator would make the host wait.
"""

from __future__ import annotations

import heapq
import math
from typing import TypedDict, cast

import torch
from torch import Tensor

from .standard import IGNORE

_OF_ROWS = ("input_ids", "position_ids", "prompt_start", "start", "count")
_OF_COMPLETIONS = ("source", "label", "row", "place")


class SharedRows(TypedDict):
    """B prompts with k completions each, in R ≤ B rows.

    Standard row j·B + i is completion j of prompt i. N is the number of completion tokens that have a prediction; a
    batch without any has N = 1 and the label −100, so that the forward pass still reaches every parameter.

    A token is shared, or belongs to one completion. Shared tokens begin at `prompt_start`, own tokens at `start`.
    Padding counts as a prompt of its own that reaches to the end of the row.
    """

    input_ids: Tensor  # [R, S] padded on the right
    position_ids: Tensor  # [R, S] place in the standard row without its padding
    prompt_start: Tensor  # [R, S] the column in which the token's prompt begins
    start: Tensor  # [R, S] the column in which the token's completion begins; for a shared token, its prompt
    count: Tensor  # [R, S] how many standard rows have the token: k, 1, or 0 for padding
    source: Tensor  # [N] where in the flattened [R · S] the token is predicted
    label: Tensor  # [N] the token
    row: Tensor  # [N] its standard row
    place: Tensor  # [N] its place among the row's completion tokens, from 0
    is_completion: Tensor  # [k·B, A] bool, place < the row's number of completion tokens; A is the largest number


class PackedRows(TypedDict):
    """`SharedRows` for the transfer to the device: three copies in place of ten, at half the bytes."""

    of_rows: Tensor  # [5, R, S] int32
    of_completions: Tensor  # [4, N] int32
    is_completion: Tensor  # [k·B, A] bool


def packed(rows: SharedRows) -> PackedRows:
    """The rows as a batch carries them."""
    tensors = cast("dict[str, Tensor]", rows)
    return PackedRows(
        of_rows=torch.stack([tensors[name] for name in _OF_ROWS]).int(),
        of_completions=torch.stack([tensors[name] for name in _OF_COMPLETIONS]).int(),
        is_completion=rows["is_completion"],
    )


def unpacked(rows: PackedRows) -> SharedRows:
    """The rows that `packed` was given."""
    tensors = dict(zip(_OF_ROWS, rows["of_rows"].long(), strict=True))
    tensors |= zip(_OF_COMPLETIONS, rows["of_completions"].long(), strict=True)
    return cast("SharedRows", {**tensors, "is_completion": rows["is_completion"]})


def width_step(device: torch.device) -> int:
    """The number that the width of shared rows is a multiple of.

    On an accelerator each width is new work for the attention: cuDNN builds a plan for every shape, and kernels copy a
    mask whose rows are not aligned.
    """
    return 1 if device.type == "cpu" else 64


def shared_rows(
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    k: int = 2,
    balance: float = 4096.0,
    step: int = 1,
) -> SharedRows:
    """Lays k rows per prompt out as one, and packs short ones behind each other.

    The common beginning of the k rows is shared, up to the first completion token of any of them. The rest of each row
    is a segment of its own. That includes the end of the prompt where tokens merge with the completion's, or where
    truncation cut one row.

    Args:
        input_ids: [k·B, T] standard rows, padded on either side.
        attention_mask: [k·B, T] 0 where padded.
        labels: [k·B, T] token ids, −100 where a token is not part of a completion.
        k: completions per prompt.
        balance: the row width at which attention, which grows with its square, costs as much as everything else.
        step: the width is a multiple of this.
    """
    rows, width = input_ids.shape
    ids, labels, length = _left_aligned(input_ids, attention_mask, labels)
    at = torch.arange(width)

    lengths = length.view(k, -1)
    shared = _shared_length(ids.view(k, -1, width), labels.view(k, -1, width), lengths)
    own = lengths - shared
    begin = shared + own.cumsum(0) - own  # [k, B] where the segment of completion j begins
    total = shared + own.sum(0)

    in_prompt = at < shared[:, None]
    target = torch.where(in_prompt, at, at + (begin - shared)[..., None])  # [k, B, T] place behind the prompt's start
    row, column, size, n_rows = _placed(total.tolist(), balance, step)
    target = (target + (row * size + column)[:, None]).view(rows, width)
    real = at < length[:, None]
    where, in_prompt = target[real], in_prompt.expand(k, -1, width).reshape(rows, width)
    start = torch.where(in_prompt, column.repeat(k)[:, None], (begin + column).flatten()[:, None])

    used = torch.zeros(n_rows, dtype=torch.long).scatter_reduce(0, row, column + total, "amax")
    end = used.repeat_interleave(size)
    zeros = torch.zeros_like(end)

    def laid_out(values: Tensor, padding: Tensor) -> Tensor:
        # the k copies of a shared token fall on one another
        return padding.index_put((where,), values.expand(rows, width)[real]).view(-1, size)

    # the first token of a row has no prediction, as in the standard forward pass
    predicted = real & (labels != IGNORE) & (at > 0)
    count = predicted.sum(1)
    of, token = predicted.nonzero(as_tuple=True)
    place = (predicted.cumsum(1) - 1)[of, token]
    source, label = target[of, token - 1], labels[of, token]
    if not len(of):
        of = place = source = torch.zeros(1, dtype=torch.long)
        label = torch.full((1,), IGNORE)
    return SharedRows(
        input_ids=laid_out(ids, zeros),
        position_ids=laid_out(at, zeros),
        prompt_start=laid_out(column.repeat(k)[:, None], end),
        start=laid_out(start, end),
        count=laid_out(torch.where(in_prompt, k, 1), zeros),
        source=source,
        label=label,
        row=of,
        place=place,
        is_completion=torch.arange(max(int(count.max()), 1)) < count[:, None],
    )


def _placed(lengths: list[int], balance: float, step: int) -> tuple[Tensor, Tensor, int, int]:
    """Each prompt's row and column, the rows' width, and their number: at the least cost R · S · (1 + S / balance)."""
    total, longest = sum(lengths), max(*lengths, 1)

    def cost(n_rows: int, width: int) -> float:
        width = math.ceil(width / step) * step
        return n_rows * width * (1 + width / balance)

    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    places: list[tuple[int, int]] = []
    size, n_rows, least = 0, 0, math.inf
    # no layout is narrower than its longest prompt and its share of all tokens: most numbers of rows cannot win
    bounds = {n: cost(n, max(longest, math.ceil(total / n))) for n in range(1, len(lengths) + 1)}
    for n in sorted(bounds, key=bounds.__getitem__):
        if bounds[n] >= least:
            break
        found, width = _spread(lengths, order, n)
        if cost(n, width) < least:
            places, size, n_rows, least = found, width, n, cost(n, width)
    row, column = torch.tensor(places).unbind(1)
    return row, column, math.ceil(max(size, 1) / step) * step, n_rows


def _spread(lengths: list[int], order: list[int], n_rows: int) -> tuple[list[tuple[int, int]], int]:
    """Each prompt's (row, column), placing the longest first into the emptiest row; and the length of the fullest."""
    rows, places = [(0, row) for row in range(n_rows)], [(0, 0)] * len(lengths)
    for i in order:
        used, row = rows[0]
        places[i] = (row, used)
        heapq.heapreplace(rows, (used + lengths[i], row))
    return places, max(used for used, _ in rows)


def _left_aligned(ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows moved to the left edge, and their lengths without padding."""
    order = (mask == 0).to(torch.int8).argsort(dim=1, stable=True)
    return ids.gather(1, order), labels.gather(1, order), (mask != 0).sum(1)


def _shared_length(ids: Tensor, labels: Tensor, length: Tensor) -> Tensor:
    """[B] the number of tokens that the k rows of a prompt have in common before the first completion token."""
    alike = (ids == ids[0]).all(0) & (labels == IGNORE).all(0)
    alike &= torch.arange(ids.size(-1)) < length.amin(0)[:, None]
    return alike.long().cumprod(1).sum(1)
