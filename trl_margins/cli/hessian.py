"""`trl-margins hessian`: how sharply a loss curves in the LM head's weight of one or several models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..checks import check_names
from ..data.loading import load_splits, pick_split
from ..disk import write
from ..evaluation.intervals import student_interval
from ..evaluation.sets import evaluation_set
from ..tables import markdown_table
from .options import LENGTH, OptionsParser, ScoredRowOptions, option, usage
from .setup import MAX_LENGTH, check_files, check_format, find_model, load_model, load_tokenizer, of_training

TOP = 5


@dataclass(kw_only=True)
class HessianArguments(ScoredRowOptions):
    """Models, pairs and loss."""

    model_name_or_path: list[str] = option("One or more models: folders (also an adapter's) or Hub ids.")
    dataset_name: str = option("A file, a saved data set, a folder of files or a Hub id, with pairs.")
    dataset_split: str | None = option("Split; by default the only one there is.", None)
    max_pairs: int = option("Pairs, drawn at random: the same for every model.", 32)
    batch_size: int = option("Pairs of a batch, each of which has its own Hessian.", 4)
    seed: int = option("Seed of the draw.", 0)
    beta: float = option("β of SimPO's loss, of which the Hessian is for every model.", 2.5)
    gamma_beta_ratio: float = option("γ of SimPO's loss, over β.", 0.55)
    max_length: int | None = option(LENGTH, None)
    dtype: str = option(
        "Dtype of the weights and of the Hessian: float32 or float64.", "float32", choices=("float32", "float64")
    )
    json: str | None = option("File for the eigenvalues of each batch, as JSON.", None)
    trust_remote_code: bool = option("Run the model's own code.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("model_name_or_path", self.model_name_or_path)


def main(argv: Sequence[str]) -> int:
    """Computes the eigenvalues, prints the table, writes the file."""
    (args,) = OptionsParser("hessian", HessianArguments).parse(argv)
    with usage():
        check_files([args.json], [args.dataset_name])
        check_format(args.json, "JSON", ".json")
    import torch
    from accelerate.utils.memory import clear_device_cache

    from ..evaluation.hessian import head_spectrum
    from ..evaluation.scorer import completion_tokens
    from ..forward.head import merged

    models, code = args.model_name_or_path, args.trust_remote_code
    for name in models:
        find_model(name)
    rows = pick_split(load_splits(args.dataset_name, args.dataset_config), args.dataset_split, args.dataset_name)
    drawn = np.random.default_rng([args.seed, 2]).permutation(len(rows))[: args.max_pairs]
    columns = {"prompt_column": args.prompt_column, "system_column": args.system_column}
    pairs = evaluation_set(rows.select(drawn), args.dataset_name, args.score_columns, **columns)
    if pairs.kind != "pairs":
        raise ValueError(f"{args.dataset_name} holds no pairs: it needs the columns prompt, chosen and rejected")
    length = of_training("max_length", args.max_length, models, MAX_LENGTH)
    tokenization = of_training("tokenization", None, models, "chat-template")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    found = {}
    for name in models:
        model = load_model(name, dtype="float32", device_map=None, trust_remote_code=code)  # TRL takes no float64
        model = merged(model, name).to(device, getattr(torch, args.dtype))
        tokenizer = load_tokenizer(name, trust_remote_code=code)
        tokens = completion_tokens(model, tokenizer, pairs.rows, length, tokenization, name)
        tokens = [row for row in tokens if row.has_completions]  # training drops the others
        if not tokens:
            raise ValueError(f"in all {len(pairs.rows)} pairs the prompt alone fills max_length={length}: raise it")
        batches = [tokens[i : i + args.batch_size] for i in range(0, len(tokens), args.batch_size)]
        spectra = [
            head_spectrum(
                model, batch, args.beta, args.gamma_beta_ratio * args.beta, TOP, f"{name}, {i}/{len(batches)}"
            )
            for i, batch in enumerate(batches, 1)
        ]
        found[name] = np.array(spectra)
        del model
        clear_device_cache(garbage_collection=True)
    numbers = {
        name: {
            "lambda_max": each[:, 0].tolist(),
            "top_5_mean": each[:, :TOP].mean(1).tolist(),
            "lambda_min": each[:, TOP].tolist(),
        }
        for name, each in found.items()
    }
    print(
        markdown_table(
            ["", "λ_max", f"mean of the top {TOP}", "λ_min"], (_row(name, numbers[name]) for name in models)
        )
    )
    print(
        f"\nOf the Hessian of SimPO's loss (β = {args.beta:g}, γ = {args.gamma_beta_ratio:g} β) in the LM head's "
        f"weight: means over {len(batches)} batches of up to {args.batch_size} pairs, with Student's 95 % intervals."
    )
    if args.json:
        settings = {**asdict(args), "max_length": length, "tokenization": tokenization}
        write(args.json, json.dumps({**settings, "eigenvalues": numbers}, indent=2) + "\n")
    return 0


def _row(name: str, numbers: dict[str, list[float]]) -> list[str]:
    intervals = map(student_interval, numbers.values())
    return [name, *(f"{mean:.4g}" if np.isnan(half) else f"{mean:.4g} ± {half:.2g}" for mean, half in intervals)]
