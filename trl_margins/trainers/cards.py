"""Collects what a model card says of a training, and writes the card: TRL's, with all that we know besides."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.trainer.utils import get_config_model_id

from .. import __version__
from ..data.bundled import BUNDLED_MODELS, BUNDLED_PREFIX
from ..report.card import CardFacts, Image, SetFacts, completed
from ..report.card_results import logged_evaluations, read_report
from ..report.run_folder import INFO, read_run
from .card_settings import adapter_kind, reward_kind, settings
from .python_lines import python_lines

if TYPE_CHECKING:
    from .mixin import MarginMixin

logger = logging.getLogger(__name__)

CARD = "README.md"
FIGURES = "figures"
TAGS = ("trl-margins", "preference-optimization")


class CardMixin:
    """A trainer whose cards tell what it trained, and how."""

    reproduce: str | None = None  # the command that starts this training, for the card
    set_facts: dict[str, SetFacts]

    def _take_names(self) -> None:
        """The name, paper and tags of the config's method, where the class has TRL's own; tags for search.

        Before TRL's own `__init__`, which gives the tags to the model.
        """
        method, tags = self.options.method, list(type(self)._tag_names)
        if method and type(self)._name in (CPOTrainer._name, DPOTrainer._name):
            self._name, self._paper = method.name, method.paper.as_trl()
            tags += method.tags
        tags += [term.name for term in self.objective.terms]
        self._tag_names = list(dict.fromkeys([*tags, *TAGS]))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        *,
        eval_dataset_name: str | None = None,
        reproduce: str | None = None,
        evaluation: str | Path | Sequence[str | Path] = (),
    ) -> None:
        """Writes `README.md` and `figures/` to the output folder: TRL's card, and what was trained, on what, how.

        While training goes on (TRL writes a card with every checkpoint) no pictures are drawn. A card that cannot be
        written is a warning: neither a run nor the model that it describes is lost for it.

        Args:
            model_name: the model's; the output folder's, if not given.
            dataset_name: what the training set is called. Linked if it can be a Hub id.
            tags: further tags.
            eval_dataset_name: what the evaluation set is called, if it is not a part of `dataset_name`.
            reproduce: the command that starts this training; `trainer.reproduce`, or Python lines, if not given.
            evaluation: files that `trl-margins evaluate --json` wrote of this model.

        Raises:
            ValueError: a file of `evaluation` that is another one.
        """
        if not self.is_world_process_zero():
            return
        reports = [evaluation] if isinstance(evaluation, str | Path) else evaluation
        evaluations = [read_report(file) for file in reports]
        try:
            facts = card_facts(self, model_name, dataset_name, eval_dataset_name)
            command = reproduce or self.reproduce
            facts = dataclasses.replace(
                facts,
                reports=evaluations,
                images=[] if self.is_in_train else pictures(self),
                reproduce=command or python_lines(self, facts),
                reproduce_language="bash" if command else "python",
            )
            self._write_card(facts, dataset_name, tags)
        except Exception as error:
            if not self.is_in_train and not isinstance(error, OSError):
                raise
            logger.warning(
                "the model card of %s cannot be written (%s: %s); trainer.create_model_card() writes it again",
                self.args.output_dir,
                type(error).__name__,
                error,
            )

    def _write_card(self, facts: CardFacts, dataset_name: str | None, tags: str | list[str] | None) -> None:
        super().create_model_card(facts.model_name, dataset_name, tags)
        file = Path(self.args.output_dir, CARD)
        completed(ModelCard.load(file), facts).save(file)
        if facts.adapter:
            _tell_peft(self, file)


def _tell_peft(trainer: MarginMixin, file: Path) -> None:
    """PEFT's own entries; it would drop the tags, and write down the folder that the base model came from."""
    before = ModelCard.load(file).data
    trainer.accelerator.unwrap_model(trainer.model).create_or_update_model_card(str(file.parent))
    card = ModelCard.load(file)
    added = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")]
    if before.base_model:
        added.append(f"base_model:adapter:{before.base_model}")
    card.data.tags = list(dict.fromkeys([*(before.tags or []), *added]))
    card.data.base_model = before.base_model
    card.save(file)


# Facts


def card_facts(
    trainer: MarginMixin, model_name: str | None, dataset_name: str | None, eval_dataset_name: str | None
) -> CardFacts:
    """What a trainer knows, without pictures."""
    config, state, objective = trainer.args, trainer.state, trainer.objective
    folder = Path(config.output_dir).resolve().name
    loads_best = config.load_best_model_at_end and state.best_model_checkpoint and not trainer.is_in_train
    best_step = state.best_global_step if loads_best else None
    evals = trainer.eval_dataset
    split = None if isinstance(evals, dict) else getattr(evals, "split", None)
    return CardFacts(
        model_name=model_name or folder,
        model_id=trainer.hub_model_id or folder,
        base_model=_base_model(trainer),
        dataset_name=dataset_name,
        trained_with=trainer._name,
        version=__version__,
        reward=reward_kind(trainer),
        losses=objective.losses,
        method=trainer.options.method,
        weights=tuple(term.name for term in objective.weights),
        margins=tuple(term.name for term in objective.margins),
        gamma=objective.gamma,
        settings=settings(trainer),
        sets=list(trainer.set_facts.values()),
        evaluations=logged_evaluations(state.log_history, best_step),
        min_score_gap=trainer.options.eval_min_score_gap,
        last_step=state.global_step,
        best_step=best_step,
        best_by=config.metric_for_best_model,
        eval_dataset_name=eval_dataset_name,
        eval_split=str(split) if split and str(split) != "train" else None,  # files are all train to load_dataset
        adapter=adapter_kind(trainer.model),
        encoder_decoder=bool(getattr(trainer.model.config, "is_encoder_decoder", False)),
        chat=bool(getattr(trainer.processing_class, "chat_template", None)),
    )


def _base_model(trainer: MarginMixin) -> str | None:
    name = get_config_model_id(trainer.model.config)
    # the bundled model lies in a folder that is called after its version
    if Path(name).parent.name in BUNDLED_MODELS:
        return BUNDLED_PREFIX + Path(name).parent.name
    return name or None


# Pictures


def pictures(trainer: MarginMixin) -> list[Image]:
    """Draws what the run folder tells; nothing before training, without a pair log, or without matplotlib."""
    folder = Path(trainer.args.output_dir)
    if trainer._pair_log is None or not trainer.state.global_step or not (folder / INFO).is_file():
        return []
    if find_spec("matplotlib") is None:
        logger.info("no pictures for the model card: pip install 'trl-margins[report]'")
        return []
    from ..report.figures import draw_pictures
    from ..report.page import render

    try:
        run = read_run(folder)
    except (ValueError, FileNotFoundError) as error:
        logger.warning("no pictures for the model card: %s", error)
        return []
    images = []
    try:
        for picture in draw_pictures([dataclasses.replace(run, name=trainer._name)]):
            file = folder / FIGURES / f"{picture.name}.png"
            file.unlink(missing_ok=True)  # an earlier run's would be uploaded beside this card
            if picture.figure is not None:
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(render(picture.figure, "png"))
                images.append(Image(f"{FIGURES}/{file.name}", picture.title, picture.caption))
    except OSError as error:
        logger.warning("the model card has %d pictures, and not the others: %s", len(images), error)
    return images
