"""`trl-margins demo`: GapPO from data to model card, on the bundled model and a synthetic preference set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.demo import bundled_model_path, make_demo_splits
from ..disk import check_writable
from ..evaluation.tables import pair_table
from ..printable import outlive_readers
from .options import Options, OptionsParser, option, warn_of_unread
from .setup import load_model, load_tokenizer

METRICS = {
    "pwa": "eval_pwa",
    "pwa_all": "eval_pwa_all",
    "spearman": "eval_spearman",
    "reward_gap": "eval_rewards/margins",
    "n_pairs_gap": "eval_n_pairs_gap",
    "n_pairs": "eval_n_pairs",
}


@dataclass(kw_only=True)
class DemoArguments(Options):
    """A few minutes on two cores."""

    output_dir: str = option("Folder for the trained model.", "gappo-demo")
    max_steps: int = option("Optimizer steps.", 30)
    batch_size: int = option("Pairs per step.", 8)
    learning_rate: float = option("Peak learning rate.", 1e-4)
    seed: int = option("Seed of the data and of the training order.", 0)
    data_only: str | None = option("Folder for the pairs, as train.jsonl and test.jsonl; nothing is trained.", None)


def main(argv: Sequence[str]) -> int:
    """Creates the data, trains, prints the metrics before and after."""
    (args,) = OptionsParser("demo", DemoArguments).parse(argv)
    warn_of_unread([("output_dir max_steps batch_size learning_rate", not args.data_only, "training")], args)
    data = make_demo_splits(seed=args.seed)
    if args.data_only:
        check_writable(args.data_only)
        for split, rows in data.items():
            file = Path(args.data_only, f"{split}.jsonl")
            rows.to_json(file)
            print(f"{len(rows)} pairs in {file}")
        return 0
    check_writable(args.output_dir)
    from .. import GapPOConfig, GapPOTrainer
    from ..trainers.folder import check_unused, settings_of

    model = str(bundled_model_path("smollm2-135m-instruct"))
    if settings_of(Path(args.output_dir)).get("model") != model:  # else it is a demo's, which this one moves aside
        check_unused(args.output_dir)
    trainer = GapPOTrainer(
        load_model(model, device_map=None),
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
        processing_class=load_tokenizer(model),
    )
    outlive_readers()
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model(args.output_dir)
    trainer.create_model_card(model_name=Path(args.output_dir).name)
    reports = {
        when: {name: metrics.get(key) for name, key in METRICS.items()}
        for when, metrics in {"before": before, "after": trainer.evaluate()}.items()
    }
    print(f"\n{pair_table(reports, trainer.args.eval_min_score_gap, 'nats per token')}")
    print(
        f"\nThe model is in {args.output_dir}: transformers.pipeline('text-generation', '{args.output_dir}') loads it."
    )
    return 0
