"""Names that look like others."""

from __future__ import annotations

import pytest

from trl_margins.checks import looks_like

KNOWN = ("prompt", "chosen", "score_chosen", "score", "responses")


@pytest.mark.parametrize(
    ("name", "meant"),
    {
        "\ufeffprompt": "prompt",  # a byte-order mark
        "prompt\u200b": "prompt",
        "pro\u00admpt": "prompt",  # a soft hyphen
        "\u200eprompt": "prompt",
        "prompt\u00a0": "prompt",
        "\tprompt": "prompt",
        "prompt\ufe0f": "prompt",  # a variation selector
        "\u3164prompt": "prompt",  # Hangul's filler is a letter
        "prom\u0440t": "prompt",  # Cyrillic
        "pr\u03bfmpt": "prompt",  # Greek
        "\uff50\uff52\uff4f\uff4d\uff50\uff54": "prompt",  # full-width
        "score_\u0441hosen": "score_chosen",
    }.items(),
)
def test_what_looks_like_a_known_name(name, meant):
    assert looks_like(name, KNOWN) == meant


@pytest.mark.parametrize(
    "name",
    [
        *KNOWN,  # it is one
        "prompts",
        "Prompt",  # a reader sees the difference
        "prompt\u4e2d",
        "r\u00e9ponses",
        "scor\u00e9",
        "\u043e\u0442\u0432\u0435\u0442",  # a word of another alphabet, with as many letters as "chosen" has
        "\u56de\u7b54",
        "",
        "\u200b",
    ],
)
def test_what_does_not(name):
    assert looks_like(name, KNOWN) is None
