"""The alignment-handbook's mixtures of data sets, in both of its forms, as a mixture of today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config_file import Settings, check_known, is_number, short

Changed = tuple[Settings, str]  # today's settings, and a remark


def of_mixer(value: Any, written: Mapping[str, Any], whose: str) -> Changed:
    """{name: fraction}: the first rows of each set's training splits, and its whole test split."""
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"dataset_mixer: {short(value)} is not a mapping from data sets to fractions")
    fractions = {name: _fraction(f"dataset_mixer: {name}", share) for name, share in value.items()}
    configs = written.get("dataset_configs") or [None] * len(fractions)
    if len(configs) != len(fractions):
        raise ValueError(f"dataset_configs has {len(configs)} names for {len(fractions)} sets in dataset_mixer")
    train, test = _mixer_splits(written.get("dataset_splits") or ["train", "test"])
    parts = [
        {"path": name, "name": config, "split": split}
        for name, config in zip(fractions, configs, strict=True)
        for split in train
    ]
    shares = [share for share in fractions.values() for _ in train]
    remarks = []  # about what the old scripts did to rows unasked
    if "auto_insert_empty_system_msg" not in written:
        remarks.append("rows are used as they are: the old script inserted an empty system message for some templates")
    model = str(written.get("model_name_or_path", "")).lower()
    if whose in ("SimPO", "γ-PO", "AMaPO", "α-DPO", "SimPER") and "mistral" in model:
        remarks.append("and a Mistral model keeps its chat template, which it replaced")
    return {**_mixed(parts, shares), **({"dataset_test_split": test} if test else {})}, ", ".join(remarks)


def _mixer_splits(splits: Any) -> tuple[list[str], str | None]:
    splits = [splits] if isinstance(splits, str) else list(splits)
    train = [split for split in splits if "train" in split]
    test = [split for split in splits if "train" not in split and "test" in split]
    if strange := [split for split in splits if split not in (*train, *test)]:
        raise ValueError(f"dataset_splits: {strange[0]!r} has neither train nor test in its name")
    if not train or len(test) > 1:
        raise ValueError(f"dataset_splits: {splits} must name at least one training split and at most one for tests")
    return train, test[0] if test else None


def of_mixture(value: Any) -> Changed:
    """{datasets: [{id, config, split, columns, weight}], seed, test_split_size}: random rows of each set, mixed."""
    _check_mapping(value, "dataset_mixture", ("datasets", "seed", "test_split_size"))
    if not isinstance(value.get("datasets"), list) or not value["datasets"]:
        raise ValueError("dataset_mixture: datasets is not a list of data sets")
    parts, shares = [], []
    for number, entry in enumerate(value["datasets"], 1):
        where = f"dataset_mixture: set {number}"
        _check_mapping(entry, where, ("id", "config", "split", "columns", "weight"))
        if not entry.get("id"):
            raise ValueError(f"{where} has no id")
        share = entry.get("weight")
        shares.append(_fraction(f"{where}, weight", 1.0 if share is None else share))
        part = {"path": entry["id"], "name": entry.get("config"), "split": entry.get("split", "train")}
        parts.append({**part, "columns": entry.get("columns")})
    if len({frozenset(part["columns"]) for part in parts if part["columns"]}) > 1:
        raise ValueError("dataset_mixture: all sets must name the same columns")
    size = value.get("test_split_size")
    mixed = _mixed(parts, shares, always=size is not None)
    if "datasets" in mixed:
        mixed |= {"mixture_seed": value.get("seed") or 0, **({} if size is None else {"test_split_size": size})}
    return mixed, ""


def _mixed(parts: list[dict[str, Any]], shares: list[float], always: bool = False) -> Settings:
    """The mixture of these sets; one whole set is a mixture only if `always`."""
    parts = [{name: said for name, said in part.items() if said} for part in parts]
    if shares == [1.0] and "columns" not in parts[0] and not always:
        names = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
        return {today: parts[0][name] for name, today in names.items() if name in parts[0]}
    return {"datasets": parts, **({} if set(shares) == {1.0} else {"mixture_weights": shares})}


def _fraction(what: str, share: Any) -> float:
    if not (is_number(share) and 0 <= share <= 1):
        raise ValueError(f"{what}: {short(share)} is not a fraction of its rows: a number, at least 0 and at most 1")
    return float(share)


def _check_mapping(value: Any, where: str, known: tuple[str, ...]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {short(value)} is not a mapping with {', '.join(known)}")
    check_known(value, known, where)
