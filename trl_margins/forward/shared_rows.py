"""The layout of the shared-prompt pass: [prompt | answer 1 | … | answer k] in place of k rows, and as many prompts in
one row as leave the least padding.

Made on the CPU, in the collator: what it looks up in the tokens would make an accelerator wait.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from .standard import IGNORE

SHARED, PADDING = 0, -1  # segments; answers are 1 … k


class SharedRows(TypedDict):
    """B prompts with k answers each in R ≤ B rows, as tensors alone, so that a batch carries it to the device.

    Standard row j·B + i is answer j of prompt i. N is the number of answer tokens that have a prediction; a batch
    without any has N = 1 and the label −100, so that the pass still reaches every parameter.
    """

    input_ids: Tensor  # [R, S] padded on the right
    position_ids: Tensor  # [R, S] place in the standard row without its padding
    prompt: Tensor  # [R, S] which prompt a token belongs to, −1 padding
    segment: Tensor  # [R, S] 0 shared, 1 … k answers, −1 padding
    count: Tensor  # [R, S] how many standard rows have the token: k, 1, or 0 for padding
    source: Tensor  # [N] where in the flattened [R · S] the token is predicted
    label: Tensor  # [N] the token
    row: Tensor  # [N] its standard row
    place: Tensor  # [N] its place among the row's answer tokens, from 0
    is_answer: Tensor  # [k·B, A] bool, place < the row's number of answer tokens; A is the largest such number


def shared_rows(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor, k: int = 2, balance: float = 4096.0
) -> SharedRows:
    """Lays k rows per prompt out as one, and short ones behind each other.

    What the k rows begin with alike is shared, as far as no row has an answer token there. The rest of each row is a
    segment of its own, part of the prompt included where tokens merge with the answer's or truncation cut it.

    Args:
        input_ids: [k·B, T] standard rows, padded on either side.
        attention_mask: [k·B, T] 0 where padded.
        labels: [k·B, T] token ids, −100 where a token is not part of an answer.
        k: answers per prompt.
        balance: the row width at which attention, which grows with the square of it, costs as much as all else.
    """
    rows, width = input_ids.shape
    ids, labels, length = _without_padding(input_ids, attention_mask, labels)
    at = torch.arange(width)

    per_answer = ids.view(k, -1, width), labels.view(k, -1, width), length.view(k, -1)
    shared = _shared_length(*per_answer)
    own = per_answer[2] - shared
    begin = shared + own.cumsum(0) - own  # [k, B] where answer j's segment begins
    total = shared + own.sum(0)

    in_prompt = at < shared[:, None]
    target = torch.where(in_prompt, at, at + (begin - shared)[..., None])  # [k, B, T] place behind the prompt's start
    start, size, n_rows = _packed(total.tolist(), balance)
    target = (target + start[:, None]).view(rows, width)
    real = at < length[:, None]
    segment = torch.arange(1, k + 1)[:, None, None].masked_fill(in_prompt, SHARED).view(rows, width)
    prompt = torch.arange(len(shared))[:, None].expand(k, -1, width).reshape(rows, width)

    def laid_out(values: Tensor, padding: int) -> Tensor:
        # the k copies of a shared token fall on one another
        flat = values.new_full((n_rows * size,), padding)
        return flat.index_put_((target[real],), values.expand(rows, width)[real]).view(-1, size)

    # the first token of a row is predicted by nothing, as in the standard pass
    predicted = real & (labels != IGNORE) & (at > 0)
    count = predicted.sum(1)
    row, column = predicted.nonzero(as_tuple=True)
    place = (predicted.cumsum(1) - 1)[row, column]
    source, label = target[row, column - 1], labels[row, column]
    if not len(row):
        row = place = source = torch.zeros(1, dtype=torch.long)
        label = torch.full((1,), IGNORE)
    return SharedRows(
        input_ids=laid_out(ids, 0),
        position_ids=laid_out(at, 0),
        prompt=laid_out(prompt, PADDING),
        segment=laid_out(segment, PADDING),
        count=laid_out(torch.where(segment == SHARED, k, 1), 0),
        source=source,
        label=label,
        row=row,
        place=place,
        is_answer=torch.arange(max(int(count.max()), 1)) < count[:, None],
    )


def _packed(lengths: list[int], balance: float) -> tuple[Tensor, int, int]:
    """Where each prompt starts in the flattened rows, the rows' width, and their number: at the least cost
    R · S · (1 + S / balance).
    """
    layouts = (_spread(lengths, n) for n in range(1, len(lengths) + 1))
    rows, used = min(layouts, key=lambda layout: len(layout[1]) * (s := max(layout[1])) * (1 + s / balance))
    size = max(*used, 1)
    return torch.tensor([row * size + column for row, column in rows]), size, len(used)


def _spread(lengths: list[int], n_rows: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Each prompt's (row, column), the longest first into the emptiest row; and how full the rows are."""
    used, places = [0] * n_rows, [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = min(range(n_rows), key=used.__getitem__)
        places[i] = (row, used[row])
        used[row] += lengths[i]
    return places, used


def _without_padding(ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows moved to the left edge, and their lengths."""
    order = (mask == 0).to(torch.int8).argsort(dim=1, stable=True)
    return ids.gather(1, order), labels.gather(1, order), (mask != 0).sum(1)


def _shared_length(ids: Tensor, labels: Tensor, length: Tensor) -> Tensor:
    """[B] how many tokens the k rows of a prompt begin with alike, before any row's first answer token."""
    alike = (ids == ids[0]).all(0) & (labels == IGNORE).all(0)
    alike &= torch.arange(ids.size(-1)) < length.amin(0)[:, None]
    return alike.long().cumprod(1).sum(1)
