"""Aliases of aliases: a few lines of YAML that come to more values than a machine has memory for."""

from __future__ import annotations

import yaml

MOST_VALUES = 100_000  # of a whole file; the longest recipe has a few dozen


def check_aliases(root: yaml.Node | None) -> None:
    """Counts the values that a YAML file comes to where each alias is written out, without writing it out.

    Args:
        root: what `yaml.compose` gives; None of an empty file.

    Raises:
        yaml.constructor.ConstructorError: too many, or an alias within what it stands for; with its line.
    """
    if root is not None:
        _count(root, {})


def _count(node: yaml.Node, known: dict[yaml.Node, int | None]) -> int:
    if node in known:
        found = known[node]
        if found is None:
            raise _refused(node, "an alias stands for something that it is part of")
        return found
    known[node] = None  # as long as its parts are counted
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in parts for part in pair]
    number = 1 + sum(_count(part, known) for part in parts)
    if number > MOST_VALUES:
        raise _refused(node, f"its aliases make more than {MOST_VALUES:,} values of it: write out what they stand for")
    known[node] = number
    return number


def _refused(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError("while reading aliases", None, problem, node.start_mark)
