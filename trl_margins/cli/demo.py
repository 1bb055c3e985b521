"""`trl-margins demo`: GapPO, end to end, on the bundled model and a preference set that the package makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checks import Number
from ..data.demo import bundled_model_path, make_demo_splits
from ..evaluation.tables import pair_table
from .options import OptionsParser
from .setup import check_writable, load_model, load_tokenizer, log_to_console

NUMBERS = {
    "pwa": "eval_pwa",
    "pwa_all": "eval_pwa_all",
    "spearman": "eval_spearman",
    "reward_gap": "eval_rewards/margins",
    "n_pairs_gap": "eval_n_pairs_gap",
    "n_pairs": "eval_n_pairs",
}


@dataclass
class DemoArguments:
    """A few minutes on two cores."""

    output_dir: str = field(default="gappo-demo", metadata={"help": "Folder of the trained model."})
    max_steps: int = field(default=30, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Pairs a step."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    seed: int = field(default=0, metadata={"help": "Seed of the data and of the training order."})

    def __post_init__(self) -> None:
        Number(least=1, whole=True).check("max_steps", self.max_steps)
        Number(least=1, whole=True).check("batch_size", self.batch_size)
        Number(above=0).check("learning_rate", self.learning_rate)


def main(argv: Sequence[str]) -> int:
    """Makes the data, trains, prints the table before → after."""
    log_to_console()
    (args,) = OptionsParser(DemoArguments, prog="trl-margins demo").parse_args_and_config(list(argv))
    check_writable(args.output_dir)
    from .. import GapPOConfig, GapPOTrainer

    model_path = bundled_model_path("smollm2-135m-instruct")
    data = make_demo_splits(seed=args.seed)
    trainer = GapPOTrainer(
        load_model(str(model_path), device_map=None),
        args=GapPOConfig(
            output_dir=args.output_dir,
            train_only=["mlp"],
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            gradient_accumulation_steps=1,
            max_length=256,
            seed=args.seed,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=5,
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=load_tokenizer(str(model_path)),
    )
    numbers = {}
    for when in ("before", "after"):
        if when == "after":
            trainer.train()
            trainer.save_model(args.output_dir)
            trainer.create_model_card(model_name=Path(args.output_dir).name)
        metrics = trainer.evaluate()
        numbers[when] = {name: metrics.get(key) for name, key in NUMBERS.items()}
    print()
    print(pair_table(numbers, trainer.args.eval_min_score_gap, "nats per token"))
    print(
        f"\nThe model is in {args.output_dir}: transformers.pipeline('text-generation', '{args.output_dir}') loads it."
    )
    return 0
