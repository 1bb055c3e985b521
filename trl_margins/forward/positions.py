"""How many tokens a model has positions for."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_POSITIONS = re.compile(r"(^|\.)(wpe|\w*pos\w*)(\.|$)")  # of GPT-2; of all others
_MORE_THAN_THE_CONFIG = 8  # rows that a table of positions may have beyond the config's number: an offset, padding


def positions_of(model: Any) -> int | None:
    """Rows for tokens in the model's table of positions, learned or not; None where it has no such table."""
    config = model.config.get_text_config()
    said = getattr(config, "max_position_embeddings", None)
    if not isinstance(said, int):
        return None
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or not _POSITIONS.search(name):
            continue
        if 0 <= module.num_embeddings - said <= _MORE_THAN_THE_CONFIG:  # others are those of an image encoder
            before = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            found.append(module.num_embeddings - before)
    return min(found, default=None)


def trained_positions(model: Any) -> int | None:
    """Positions that a model with rotary ones, which go on beyond, was made for; None for one with others."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) if getattr(config, "rope_parameters", None) else None
