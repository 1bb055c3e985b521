"""Weights and margins that a column says, several terms at once, and what is wrong with a term's values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_gradients, first_batch, load, loss_and_gradients, preference_rows, quiet
from said import word_for_word  # noqa: F401 - its messages are held against said/
from test_core import random_pairs

from trl_margins import (
    AdaptiveMargin,
    AnchorMargin,
    ColumnMargin,
    ColumnWeight,
    GammaPOTrainer,
    Link,
    MarginCPOConfig,
    MarginCPOTrainer,
    MarginDPOConfig,
    MarginDPOTrainer,
    Objective,
    PairView,
    ScoreGapWeight,
    Term,
    config_class,
)
from trl_margins.links import CPO_LINKS
from trl_margins.objective import kept_pairs
from trl_margins.rewards import LengthNormalizedReward, LogRatioReward
from trl_margins.rows.scores import ScoreError
from trl_margins.terms.dynamic_target import DynamicTargetMargin
from trl_margins.terms.evaluation_factor import EvaluationFactorMargin
from trl_margins.terms.score_gap import score_gap_weight

SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
WEIGHTS, MARGINS = [0.5, 2.0, 0.0, 1.0, 3.0, 0.25], [0.5, -0.25, 0.0, 1.0, 2.0, 0.125]


def rows(weights: list[Any] = WEIGHTS, margins: list[Any] = MARGINS) -> Any:
    scored = preference_rows(len(weights), scores=lambda i: (4.0 + i % 3, 3.0))
    return scored.add_column("pair_weight", weights).add_column("margin", margins[: len(weights)])


def build(folder, tokenizer, out, data=None, evals=None, cls=MarginCPOTrainer, more=None, **settings):
    config = MarginCPOConfig if issubclass(cls, MarginCPOTrainer) else MarginDPOConfig
    args = config(**quiet(output_dir=str(out), **(SIMPO | settings if config is MarginCPOConfig else settings)))
    data = rows() if data is None else data
    return cls(
        load(folder), args=args, train_dataset=data, eval_dataset=evals, processing_class=tokenizer, **(more or {})
    )


def simpo(**terms: Any) -> Objective:
    return Objective(LengthNormalizedReward(), CPO_LINKS["simpo"], 2.0, gamma=1.0, **terms)


class TestColumns:
    @pytest.mark.parametrize("cls", [MarginCPOTrainer, MarginDPOTrainer])
    def test_a_weight(self, cls, tiny_model, tokenizer, tmp_path):
        """The gradient is the weighted mean of the pairs' own."""
        named = {"weight": "column", "weight_column": "pair_weight"}
        trainer = build(tiny_model, tokenizer, tmp_path, cls=cls, **named)
        _, weighted = loss_and_gradients(trainer, first_batch(trainer))
        alone = build(tiny_model, tokenizer, tmp_path, cls=cls)
        expected: dict[str, Any] = {}
        for i in range(4):
            batch = alone._prepare_inputs(alone.data_collator([alone.train_dataset[i]]))
            for name, gradient in loss_and_gradients(alone, batch)[1].items():
                expected[name] = expected.get(name, 0) + WEIGHTS[i] / 4 * gradient
        assert_same_gradients(weighted, expected, rtol=1e-4)

    def test_a_name_that_is_trls(self, tiny_model, tokenizer, tmp_path):
        """DPOTrainer computes a column of this name itself; to CPOTrainer it is one as any other."""
        name = "ref_chosen_logps"
        settings = {"data": rows().rename_column("pair_weight", name), "weight": "column", "weight_column": name}
        build(tiny_model, tokenizer, tmp_path / "cpo", **settings).train()
        with pytest.raises(ValueError, match=r"the objective reads \['ref_chosen_logps'\], .*give the column another"):
            build(tiny_model, tokenizer, tmp_path / "dpo", cls=MarginDPOTrainer, **settings)

    @pytest.mark.parametrize(("unit", "scale"), [("reward", 1.0), ("gamma_beta_ratio", 2.0)])
    def test_a_margin_is_the_whole_target(self, unit, scale, tiny_model, tokenizer, tmp_path, caplog):
        named = {"margin": "column", "margin_column": "margin", "margin_column_unit": unit}
        trainer = build(tiny_model, tokenizer, tmp_path, **named)
        assert "margin 'column' makes its own margins: gamma_beta_ratio and simpo_gamma are not used" in caplog.text
        batch = first_batch(trainer)
        pairs = trainer.forward_pairs(trainer.before_measuring(batch))
        output = trainer.objective(pairs, batch["pair_columns"])
        torch.testing.assert_close(output.margin, scale * torch.tensor(MARGINS[:4]))
        assert torch.equal(output.margin, output.margins["column"])

    def test_the_unit_has_to_be_said(self, tmp_path):
        named = {"margin": "column", "margin_column": "margin"}
        with pytest.raises(ValueError, match="margin 'column' needs margin_column_unit, which is not set"):
            MarginCPOConfig(**quiet(output_dir=str(tmp_path), **SIMPO, **named))
        with pytest.raises(ValueError, match="unknown margin_column_unit 'nats'; known: reward, gamma_beta_ratio"):
            MarginCPOConfig(**quiet(output_dir=str(tmp_path), **SIMPO, **named, margin_column_unit="nats"))
        with pytest.raises(ValueError, match="weight 'column' needs weight_column, which is not set"):
            MarginCPOConfig(**quiet(output_dir=str(tmp_path), weight="column"))

    def test_a_column_of_margins_is_not_one_of_scores(self, tiny_model, tokenizer, tmp_path):
        """Though `margin` is where reward trainers have their score gaps."""
        data = rows().remove_columns(["score_chosen", "score_rejected"])
        named = {"margin": "column", "margin_column": "margin", "margin_column_unit": "reward"}
        trainer = build(tiny_model, tokenizer, tmp_path, data, data, **named)
        assert trainer.set_facts["train"].score_columns == ()
        assert "eval_pwa" not in trainer.evaluate()

    @pytest.mark.parametrize(
        ("value", "complaint"),
        [
            (-1.0, "the value -1.0 is below 0"),
            (None, "the value None is None: drop the row"),
            (float("nan"), "the value nan is NaN: drop the row"),
            (float("inf"), "the value inf is infinite"),
        ],
    )
    @pytest.mark.parametrize("split", ["train", "eval"])
    def test_bad_values_stop_before_training(self, split, value, complaint, tiny_model, tokenizer, tmp_path):
        good, bad = rows(), rows([1.0, 1.0, value, 1.0])
        sets = {"data": bad} if split == "train" else {"data": good, "evals": bad}
        with pytest.raises(ScoreError, match=f"column 'pair_weight', row 2 of the {split} data set: {complaint}"):
            build(tiny_model, tokenizer, tmp_path, **sets, weight="column", weight_column="pair_weight")

    def test_words_and_missing_columns(self, tiny_model, tokenizer, tmp_path):
        named = {"weight": "column", "weight_column": "pair_weight"}
        with pytest.raises(ScoreError, match="row 1 of the train data set: the value 'much' is not a number"):
            build(tiny_model, tokenizer, tmp_path, rows(["1.0", "much"], [0.0, 0.0]), **named)
        with pytest.raises(
            ValueError, match=r"weight 'column' needs the columns \['pair_weight'\], and the train data"
        ):
            build(tiny_model, tokenizer, tmp_path, preference_rows(4), **named)
        with pytest.raises(
            ValueError, match=r"all 2 train pairs would have weight 0: .*column 'pair_weight' is from 0"
        ):
            build(tiny_model, tokenizer, tmp_path, rows([0.0, 0.0], [0.0, 0.0]), **named)

    def test_numbers_as_text(self, tiny_model, tokenizer, tmp_path):
        named = {"weight": "column", "weight_column": "pair_weight"}
        trainer = build(tiny_model, tokenizer, tmp_path, rows(["0.5", "2"], [0.0, 0.0]), **named)
        assert first_batch(trainer, 2)["pair_columns"]["pair_weight"].tolist() == [0.5, 2.0]

    def test_a_stream_is_checked_row_by_row(self, tiny_model, tokenizer, tmp_path):
        named = {"weight": "column", "weight_column": "pair_weight", "max_steps": 1}
        stream = rows([1.0, 1.0, -3.0, 1.0]).to_iterable_dataset()
        with pytest.raises(ScoreError, match=r"row 2 of the train data set: the value -3\.0 is below 0"):
            build(tiny_model, tokenizer, tmp_path, stream, cls=MarginDPOTrainer, **named).train()


class TestSeveral:
    def test_weights_multiply_and_margins_add(self):
        pairs, columns = random_pairs(0, n=6), {"w": torch.tensor(WEIGHTS), "m": torch.tensor(MARGINS)}
        columns |= {"score_chosen": torch.arange(6.0), "score_rejected": torch.ones(6)}
        gap, own = ScoreGapWeight(), ColumnWeight("w")
        several = simpo(weight=[gap, own], margin=[AdaptiveMargin(2.0), ColumnMargin("m", "reward", 2.0)])
        output = several(pairs, columns)
        assert torch.equal(output.weight, gap(output.view) * columns["w"])
        assert torch.equal(output.margin, AdaptiveMargin(2.0)(output.view) + columns["m"])
        assert list(output.weights) == ["score-gap", "column"]
        assert list(output.margins) == ["amapo", "column"]
        assert several.columns == ("score_chosen", "score_rejected", "w", "m")

    @pytest.mark.parametrize("kind", ["weight", "margin"])
    def test_one_of_several_is_that_one(self, kind):
        """Bit for bit."""
        pairs, columns = random_pairs(1), {"score_chosen": torch.arange(7.0), "score_rejected": torch.ones(7)}
        term = {"weight": ScoreGapWeight(), "margin": DynamicTargetMargin(1.0)}[kind]
        one, several = simpo(**{kind: term})(pairs, columns), simpo(**{kind: [term]})(pairs, columns)
        assert torch.equal(one.losses, several.losses)

    def test_one_name_in_a_list_is_that_name(self, tmp_path):
        settings = quiet(output_dir=str(tmp_path), **SIMPO)
        assert MarginCPOConfig(**settings, weight=["score-gap"], margin=["amapo"]).weight == "score-gap"
        assert MarginCPOConfig(**settings, weight=["none"]).weight is None
        for bad in ([], ["score-gap", "score-gap"], [None]):
            with pytest.raises(ValueError, match="weight"):
                MarginCPOConfig(**settings, weight=bad)
        with pytest.raises(ValueError, match="unknown weight 'none'"):
            MarginCPOConfig(**settings, weight=["score-gap", "none"])

    def test_the_target_margin_enters_once(self):
        pairs, columns = random_pairs(2), {"m": torch.zeros(7)}
        with_target = simpo(margin=[DynamicTargetMargin(1.0), ColumnMargin("m", "reward", 2.0)])(pairs, columns)
        torch.testing.assert_close(with_target.margin, DynamicTargetMargin(1.0)(with_target.view))
        with pytest.raises(ValueError, match="margins 'gap-aware' and 'gamma-po' each hold the target margin γ"):
            simpo(margin=[EvaluationFactorMargin(1.0), DynamicTargetMargin(1.0)])
        with pytest.raises(ValueError, match="two margin terms are called 'amapo'"):
            simpo(margin=[AdaptiveMargin(2.0), AdaptiveMargin(2.0)])

    def test_a_named_trainer_takes_more_beside_its_own(self, tiny_model, tokenizer, tmp_path):
        settings = {"margin": ["gamma-po", "column"], "margin_column": "margin", "margin_column_unit": "reward"}
        args = config_class("gamma-po")(**quiet(output_dir=str(tmp_path), **settings))
        assert args.method is None
        trainer = GammaPOTrainer(load(tiny_model), args, train_dataset=rows(), processing_class=tokenizer)
        assert [term.name for term in trainer.objective.margins] == ["gamma-po", "column"]
        args = config_class("gamma-po")(**quiet(output_dir=str(tmp_path), margin="amapo"))
        with pytest.raises(ValueError, match=r"GammaPOTrainer has margin 'gamma-po', but its .* says 'amapo'"):
            GammaPOTrainer(load(tiny_model), args, train_dataset=rows(), processing_class=tokenizer)

    def test_each_has_its_log_its_state_and_its_lines(self, tiny_model, tokenizer, tmp_path):
        settings = {
            "weight": ["score-gap", "column"],
            "weight_column": "pair_weight",
            "margin": ["amapo", "gamma-po"],
            "learning_rate": 1e-2,
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "simpo_gamma": 1.0,
        }
        data = rows(2 * WEIGHTS, 2 * MARGINS)

        def run(out: Path, resume: str | None = None) -> Any:
            trainer = build(tiny_model, tokenizer, out, data, **settings)
            trainer.train(resume_from_checkpoint=resume)
            return trainer

        trainer = run(tmp_path / "whole")
        logged = next(entry for entry in trainer.state.log_history if "weights/mean" in entry)
        for name in ("weights", "weights/score-gap", "weights/column", "target_margins", "target_margins/amapo"):
            assert {f"{name}/{part}" for part in ("mean", "std", "min", "max", "zero")} <= logged.keys()
        resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
        for (name, mine), theirs in zip(trainer.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(mine, theirs), name
        assert trainer._term_states().keys() == {"amapo", "gamma-po"}
        header = (tmp_path / "whole" / "pair_log.csv").read_text().splitlines()[0].split(",")
        assert {"weight", "weight_score-gap", "weight_column", "margin", "margin_amapo", "margin_gamma-po"} <= {
            *header
        }
        trainer.create_model_card("m")
        card = (tmp_path / "whole" / "README.md").read_text()
        cells = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in card.splitlines() if line[:1] == "|"]
        told = {row[0]: row[1] for row in cells}
        assert (told["weight"], told["margin"]) == ("score-gap, column", "amapo, gamma-po")
        assert {"weight_column", "score_gap_transform", "amapo_variant", "gamma_po_tau"} <= told.keys()
        assert re.search(r"Its weight_i is .score-gap., GapPO's · .column.\.", card)


class Named(Term):
    """A term that returns what it is given."""

    name = "focal"

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, view: PairView) -> Any:
        return self.value


class TestValues:
    @pytest.mark.parametrize(
        ("value", "complaint"),
        [
            (torch.ones(3), r"weight 'focal' returned shape \(3,\), expected \(4,\)"),
            (torch.ones(4, 1), r"weight 'focal' returned shape \(4, 1\), expected \(4,\)"),
            (torch.tensor(1.0), r"weight 'focal' returned shape \(\), expected \(4,\)"),
            (torch.ones(4, requires_grad=True), "weight 'focal' returned a tensor that requires grad; detach it"),
        ],
    )
    def test_a_wrong_one_names_the_term(self, value, complaint):
        with pytest.raises(ValueError, match=complaint):
            simpo(weight=Named(value))(random_pairs(0, n=4))

    def test_what_is_not_a_term_or_a_tensor(self):
        with pytest.raises(TypeError, match=r"weight 'focal' returned a float, expected a tensor of shape \(4,\)"):
            simpo(weight=Named(1.0))(random_pairs(0, n=4))
        with pytest.raises(
            TypeError, match=r"the weight .* is not a Term: let its class inherit from trl_margins.Term"
        ):
            simpo(weight=lambda view: view.reward_gap)

    def test_a_wrong_reward_or_link_is_named(self):
        class Half(LengthNormalizedReward):
            name = "half"

            def __call__(self, pairs):
                return pairs.chosen[:2], pairs.rejected[:2]

        mean = Link("mean", lambda x: x.reward_gap.mean())
        with pytest.raises(ValueError, match=r"reward 'half' returned shape \(2,\), expected \(4,\)"):
            Objective(Half(), CPO_LINKS["simpo"], 2.0)(random_pairs(0, n=4))
        with pytest.raises(ValueError, match=r"loss_type 'mean' returned shape \(\), expected \(4,\)"):
            Objective(LengthNormalizedReward(), mean, 2.0)(random_pairs(0, n=4))

    def test_an_error_of_ones_own_code_is_named(self):
        class Broken(Named):
            def __call__(self, view):
                return self.value[view.missing]

        class Three(LengthNormalizedReward):
            name = "three"

            def __call__(self, pairs):
                return pairs.chosen, pairs.rejected, pairs.chosen

        broken = Link("broken", lambda x: 1 / 0)
        pairs = random_pairs(0, n=4)
        with pytest.raises(RuntimeError, match=r"^weight 'focal' raises AttributeError: .*missing"):
            simpo(weight=Broken(1.0))(pairs)
        with pytest.raises(RuntimeError, match=r"^loss_type 'broken' raises ZeroDivisionError: division by zero"):
            Objective(LengthNormalizedReward(), broken, 2.0)(pairs)
        with pytest.raises(TypeError, match=r"^reward 'three' returned a tuple, expected two tensors"):
            Objective(Three(), CPO_LINKS["simpo"], 2.0)(pairs)

    @pytest.mark.parametrize(
        ("value", "kind"),
        [
            (torch.ones(4, dtype=torch.complex64), "complex"),
            (torch.ones(4).to_sparse(), "sparse"),
            (torch.ones(4, device="meta"), "meta"),
        ],
    )
    def test_values_of_another_kind(self, value, kind):
        with pytest.raises(TypeError, match=f"^weight 'focal' returned {kind} values, expected a dense tensor"):
            simpo(weight=Named(value))(random_pairs(0, n=4))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"columns": "agreement"}, "the weight 'focal' has columns='agreement': give a tuple of names"),
            ({"columns": None}, "the weight 'focal' has columns=None: give a tuple of names"),
            ({"probes": (1,)}, r"the weight 'focal' has probes=\(1,\): give a tuple of names"),
            ({"column_minimum": "0"}, "column_minimum of the weight 'focal'"),
            ({"name": 5}, "the weight Named has no name: give its class one"),
            ({"name": "a,b"}, "the weight is called 'a,b': logs and checkpoints need a name without commas"),
            ({"name": "a/b"}, "the weight is called 'a/b': logs"),
            ({"name": ""}, "the weight is called '': logs"),
        ],
    )
    def test_attributes_of_another_kind(self, changes, said):
        term = Named(1.0)
        vars(term).update(changes)
        with pytest.raises((TypeError, ValueError), match=f"^{said}"):
            simpo(weight=term)

    def test_a_class_whose_name_is_no_text(self):
        for name in (5, b"x"):
            with pytest.raises(TypeError, match=f"the name of the term Odd is {name!r}: give it a text"):
                type("Odd", (Term,), {"name": name})
        nameless = type("Odd", (Named,), {"name": None})(1.0)  # as a class that others inherit from
        with pytest.raises(TypeError, match="the weight Odd has no name: give its class one, as name = 'focus'"):
            simpo(weight=nameless)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"weight": "score-gap"}, "the weight is a name: weight='score-gap' belongs in the config"),
            ({"margin": Named}, "the margin is the class Named"),
            ({"reward": "sum"}, "the reward is 'sum', and no Reward: give an instance"),
            ({"link": "sigmoid"}, r"the link is 'sigmoid', and no Link: CPO_LINKS\['sigmoid'\] is one"),
            ({"link": {"sigmoid": 1.0}}, "the link is 'sigmoid', and no Link"),
            ({"link_options": None}, "link_options is None: give a dict"),
        ],
    )
    def test_an_objective_of_other_parts(self, changes, said):
        parts = {"reward": LengthNormalizedReward(), "link": CPO_LINKS["simpo"], "beta": 2.0}
        with pytest.raises(TypeError, match=f"^{said}"):
            Objective(**{**parts, **changes})

    @pytest.mark.parametrize("kept", [[True] * 4, torch.ones(3, dtype=torch.bool), torch.ones(4)])
    def test_pairs_that_are_kept_by_no_mask(self, kept):
        class Keeps(Named):
            def keeps(self, columns):
                return kept

        with pytest.raises((TypeError, ValueError), match=r"^keeps of margin 'focal' returned"):
            kept_pairs("margin", Keeps(1.0), {"agreement": torch.ones(4)})
        with pytest.raises(
            ValueError, match=r"^keeps of margin 'focal' returned values, and the term names no columns"
        ):
            kept_pairs("margin", Keeps(1.0), {})

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_one_that_is_not_finite_names_the_term_and_the_row(self, value, tiny_model, tokenizer, tmp_path):
        """A margin of −∞ has a finite loss, 0."""

        class Broken(Named):
            def __call__(self, view):
                return torch.where(view["row_number"] == 2, value, 0.5)

        trainer = build(tiny_model, tokenizer, tmp_path, more={"margin_term": Broken(None)}, max_steps=2)
        with pytest.raises(FloatingPointError, match=r"margin 'focal' is NaN or infinite for 1 pair\(s\): row 2"):
            trainer.train()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_the_dtype_is_that_of_the_inputs_at_least_float32(self, dtype):
        scores = torch.rand(4, 2).to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        assert score_gap_weight(*scores.T).dtype == wide
        view = PairView.of_gaps(scores[:, 0], {"evaluation_factor": scores[:, 1]}, beta=2.0, training=True)
        for term in (EvaluationFactorMargin(1.0), DynamicTargetMargin(1.0), AdaptiveMargin(2.0)):
            assert term(view).dtype == wide, term.name

    def test_a_weight_may_read_the_evaluation_factor(self, tiny_model, tokenizer, tmp_path):
        class Unlike(Term):
            name, columns = "unlike", ("evaluation_factor",)

            def __call__(self, view):
                return 1 - view["evaluation_factor"]

        trainer = build(tiny_model, tokenizer, tmp_path, more={"weight_term": Unlike()}, max_steps=1)
        trainer.train()
        assert trainer.set_facts["train"].factor == "rougeL"
        assert trainer.set_facts["train"].floored is None

    def test_a_term_is_fitted_to_the_training_set(self, tiny_model, tokenizer, tmp_path):
        class Relative(Term):
            name, columns = "relative", ("pair_weight", "score_chosen")

            def fit(self, columns):
                self.seen = columns

            def __call__(self, view):
                return view["pair_weight"]

        term = Relative()
        build(tiny_model, tokenizer, tmp_path, more={"weight_term": term})
        assert term.seen["pair_weight"].tolist() == WEIGHTS
        assert term.seen["score_chosen"].tolist() == [4.0, 5.0, 6.0] * 2
        stream, more = rows().to_iterable_dataset(), {"weight_term": Relative()}
        with pytest.raises(TypeError, match="weight 'relative' looks at the whole training set"):
            build(tiny_model, tokenizer, tmp_path, stream, cls=MarginDPOTrainer, more=more, max_steps=1)


class TestView:
    def test_what_a_term_sees(self):
        pairs = random_pairs(3, reference=True)
        seen = []

        class Looks(Term):
            name = "looks"

            def __call__(self, view):
                seen.append(view)
                return view.reward_gap

        Objective(LogRatioReward(), CPO_LINKS["sigmoid"], 0.5, margin=Looks())(pairs, {"a": torch.ones(7)})
        (view,) = seen
        tensors = [value for value in vars(view).values() if isinstance(value, torch.Tensor)]
        assert not any(value.requires_grad for value in tensors)
        chosen, rejected = pairs.chosen.detach(), pairs.rejected.detach()
        torch.testing.assert_close(view.chosen_log_ratio, chosen - pairs.ref_chosen)
        torch.testing.assert_close(view.unscaled_gap, view.chosen_log_ratio - view.rejected_log_ratio)
        torch.testing.assert_close(view.reward_gap, 0.5 * view.unscaled_gap)
        torch.testing.assert_close(view.chosen_mean_logps, chosen / pairs.chosen_length)
        torch.testing.assert_close(view.rejected_mean_logps, rejected / pairs.rejected_length)
        with pytest.raises(
            KeyError, match=r"the batch has no column 'b', only \['a'\]: name it in the term's `columns`"
        ):
            view["b"]

    def test_a_term_that_needs_a_reference(self, tiny_model, tokenizer, tmp_path):
        """It is refused on CPO; on DPO the reference model is loaded for it."""

        class Drift(Term):
            name, needs_reference = "drift", True

            def __call__(self, view):
                return torch.exp(view.chosen_log_ratio.clamp(max=0))

        with pytest.raises(ValueError, match="'drift' reads the log-probabilities of a reference model, which CPOTr"):
            build(tiny_model, tokenizer, tmp_path, more={"weight_term": Drift()})
        args = MarginDPOConfig(**quiet(output_dir=str(tmp_path), reward="length-normalized", max_steps=1))
        trainer = MarginDPOTrainer(
            tiny_model, args=args, train_dataset=rows(), processing_class=tokenizer, weight_term=Drift()
        )
        assert trainer.ref_model is not None
        trainer.train()
        assert simpo(margin=AnchorMargin(2.0)).needs_reference is False


# What a term must not do


class Halving(Term):
    """Changes a column in place."""

    name = "halving"
    columns = ("share",)

    def __call__(self, view):
        return view["share"].div_(2)


def test_inference_mode():
    objective = Objective(LengthNormalizedReward(), CPO_LINKS["simpo"], 1.0, weight=ColumnWeight("share"))
    with torch.inference_mode():
        pairs = random_pairs(0, 4)
        assert objective(pairs, {"share": torch.ones(4)}).losses.shape == (4,)


def test_inputs_are_not_changed_in_place():
    objective = Objective(LengthNormalizedReward(), CPO_LINKS["simpo"], 1.0, weight=Halving())
    with pytest.raises(ValueError, match="weight 'halving' changes what it is given in place"):
        objective(random_pairs(0, 4), {"share": torch.ones(4)})


class Observing(Term):
    """Logs a value under any name."""

    name = "observing"

    def __init__(self, key: str, shape: tuple[int, ...] = (4,)) -> None:
        self.key, self.shape = key, shape

    def __call__(self, view):
        return torch.ones_like(view.reward_gap)

    def observed(self, view, value):
        return {self.key: torch.zeros(self.shape)}


OBSERVED = [
    (Observing("rewards/chosen"), "observes 'rewards/chosen': take a name that nothing else in the logs has"),
    (Observing("mine", (4, 1)), r"observes 'mine', which must be a tensor of shape \(4,\)"),
    (Observing("mine", ()), "observes 'mine', which must be a tensor"),
    *(
        (Observing(name), f"observes '{name}': pair_log.csv has a column of that name")
        for name in ("weight", "logp/chosen")
    ),
]


@pytest.mark.parametrize(("term", "said"), OBSERVED)
def test_observed_values_have_a_shape_and_a_name_of_their_own(term, said, tiny_model, tokenizer, tmp_path):
    config = MarginCPOConfig(**quiet(output_dir=str(tmp_path), loss_type="simpo"))
    common = {"train_dataset": preference_rows(4), "processing_class": tokenizer}
    trainer = MarginCPOTrainer(load(tiny_model), config, weight_term=term, **common)
    with pytest.raises(ValueError, match=said):
        trainer.train()


@pytest.mark.parametrize("column", ["score_chosen", "score_rejected", "evaluation_factor", "row_number", "", ["w"]])
def test_columns_with_another_meaning_are_refused(column, tmp_path):
    with pytest.raises(ValueError, match="weight_column"):
        MarginCPOConfig(**quiet(output_dir=str(tmp_path), weight="column", weight_column=column))
    with pytest.raises(ValueError, match="margin_column"):
        MarginCPOConfig(
            **quiet(output_dir=str(tmp_path), margin="column", margin_column=column, margin_column_unit="reward")
        )


@pytest.mark.parametrize(("value", "problem"), [(-50.0, "is below 0"), (float("nan"), "is NaN"), (1e39, "float32")])
def test_a_set_that_comes_later_is_checked(value, problem, tiny_model, tokenizer, tmp_path):
    rows = preference_rows(4)
    config = MarginCPOConfig(**quiet(output_dir=str(tmp_path), loss_type="simpo", weight="column", weight_column="w"))
    trainer = MarginCPOTrainer(
        load(tiny_model), config, train_dataset=rows.add_column("w", [1.0] * 4), processing_class=tokenizer
    )
    with pytest.raises(ScoreError, match=f"column 'w', row 2 of the .*{problem}"):
        trainer.evaluate(rows.add_column("w", [1.0, 1.0, value, 1.0]))


def test_the_sft_term_is_not_weighted(tiny_model, tokenizer, tmp_path, caplog):
    config = MarginCPOConfig(**quiet(output_dir=str(tmp_path), weight="score-gap", cpo_alpha=0.5))
    MarginCPOTrainer(load(tiny_model), config, train_dataset=preference_rows(4), processing_class=tokenizer)
    assert "cpo_alpha=0.5: CPO's SFT term counts all pairs alike" in caplog.text
