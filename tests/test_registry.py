"""Terms, rewards, links and methods that another package registers."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from conftest import first_batch, load, loss_and_gradients, preference_rows, quiet
from said import word_for_word  # noqa: F401 - its messages are held against said/

from trl_margins import (
    GapPOConfig,
    Link,
    MarginCPOConfig,
    MarginCPOTrainer,
    MarginDPOConfig,
    MarginDPOTrainer,
    Method,
    Objective,
    Paper,
    Reward,
    ScoreGapWeight,
    Term,
    config_class,
    register_link,
    register_method,
    register_reward,
    register_term,
    registry,
)
from trl_margins.cli.train import parse
from trl_margins.links import CPO_LINKS
from trl_margins.pairs import PairLogps
from trl_margins.rewards import LengthNormalizedReward
from trl_margins.trainers.named import trainer_class
from trl_margins.trainers.objectives import objective_of

PAPER = Paper(title="A title", citation="@misc{title,\n  title = {A title}\n}")


@dataclasses.dataclass
class Focal(Term):
    """A focal weight.

    Args:
        gamma: focusing parameter.
    """

    gamma: float = 2.0
    side: Literal["both", "low"] = "both"
    name = "focal"

    def __call__(self, view):
        return torch.sigmoid(-view.reward_gap) ** self.gamma


class Shifted(Term):
    name = "shifted"
    holds_target = True

    def __init__(self, beta: float, by: float, gamma: float = 0.0) -> None:  # what every margin has, and its own
        self.by, self.beta, self.gamma = by, beta, gamma

    def __call__(self, view):
        return torch.full_like(view.reward_gap, self.by * self.beta + self.gamma)


@dataclasses.dataclass
class Half(Reward):
    """Half of the mean log-probability."""

    factor: float = 0.5
    name = "half"

    def __call__(self, pairs):
        chosen, rejected = LengthNormalizedReward()(pairs)
        return self.factor * chosen, self.factor * rejected


SQUARED = Link("squared", lambda x: (1 - (x.reward_gap - x.margin)).clamp(min=0) ** 2, takes_margin=True)

TILTED = Link("tilted", lambda x: x.options["tilted_by"] * x.reward_gap, options=(("tilted_by", 0.5),))
ONE_PAIR = PairLogps(
    *(torch.tensor([logp]) for logp in (-6.0, -7.0)), torch.tensor([3]), torch.tensor([2]), *torch.zeros(2, 1)
)


pytestmark = pytest.mark.usefixtures("clean_registry")


def config(cls: type = MarginCPOConfig, **settings: Any) -> Any:
    return cls("unused", use_cpu=True, bf16=False, **settings)


class TestTerms:
    def test_its_arguments_are_fields_of_every_config(self):
        register_term(Focal, kind="weight")
        for cls in (MarginCPOConfig, MarginDPOConfig, GapPOConfig):
            made = config(cls, weight="focal", focal_gamma=3.0)
            assert isinstance(made, cls)
            assert made.terms("weight") == (Focal(3.0),)
        fields = {item.name: item for item in dataclasses.fields(config_class(None, "cpo"))}
        assert fields["focal_gamma"].metadata["help"] == "focusing parameter."
        assert (fields["focal_gamma"].type, fields["focal_gamma"].default) == (float, 2.0)
        assert fields["focal_side"].type == Literal["both", "low"]

    def test_the_config_can_be_copied_and_pickled(self):
        register_term(Focal, kind="weight")
        made = config(weight="focal", focal_gamma=3.0)
        for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), dataclasses.replace(made)):
            assert twin.to_dict() == made.to_dict()
            assert twin.focal_gamma == 3.0

    def test_a_config_without_its_options_is_as_before(self):
        plain = config().to_dict()
        register_term(Focal, kind="weight")
        assert plain.items() <= config().to_dict().items()
        with pytest.raises(TypeError, match="unexpected keyword argument 'focal_gama'"):
            config(focal_gama=1.0)

    def test_a_margin_gets_beta_and_the_target_margin(self):
        register_term(Shifted, kind="margin")
        made = config(loss_type="simpo", beta=4.0, gamma_beta_ratio=0.5, margin="shifted", shifted_by=1.0)
        (term,) = made.terms("margin")
        assert (term.by, term.beta, term.gamma) == (1.0, 4.0, 2.0)
        with pytest.raises(ValueError, match="margin 'shifted' needs shifted_by, which is not set"):
            config(loss_type="simpo", margin="shifted")

    def test_options_that_nothing_reads_are_named(self, caplog):
        register_term(Focal, kind="weight")
        config(focal_gamma=3.0)
        assert "no effect of focal_gamma: for weight='focal', and this is 'none'" in caplog.text

    def test_what_cannot_be_registered(self):
        class NoName(Term):
            def __call__(self, view): ...

        class Scheduled(Focal):
            name = "scheduled"

            def __init__(self, schedule: Callable[[int], float]) -> None: ...

        class Clash(Focal):
            name = "clash"
            option_prefix = "focal_"

        class Taken(Term):
            name = "score-gap"

            def __call__(self, view): ...

        register_term(Focal, kind="weight")
        register_term(Focal, kind="weight")  # the module again
        with pytest.raises(TypeError, match="it is not a subclass of Term"):
            register_term(torch.nn.Linear, kind="weight")
        with pytest.raises(TypeError, match="NoName cannot be registered as a weight: its name is None"):
            register_term(NoName, kind="weight")
        with pytest.raises(TypeError, match=r"argument 'schedule' of weight 'scheduled' is of type .*Callable"):
            register_term(Scheduled, kind="weight")
        for own, said in (
            (lambda self, power: None, "argument 'power' of weight 'odd' has no type: annotate it"),
            (lambda self, power=None: None, "argument 'power' of weight 'odd' has no type: annotate it"),
            (lambda self, *powers: None, "argument 'powers' of weight 'odd' cannot be given by name"),
            (lambda self, power, /: None, "argument 'power' of weight 'odd' cannot be given by name"),
        ):
            odd = type("Odd", (Term,), {"name": "odd", "__init__": own, "__call__": Focal.__call__})
            with pytest.raises(TypeError, match=said):
                register_term(odd, kind="weight")
        for typed, default, said in (
            (float, "0.5", "'odd' does not fit its type: odd_power must be a finite number; it is '0.5'"),
            (int, 0.5, "'odd' does not fit its type: odd_power must be a whole number; it is 0.5"),
            (bool, 1, "'odd' does not fit its type: odd_power must be True or False; it is 1"),
            (Literal["one", "two"], "three", "'odd' does not fit its type: unknown odd_power 'three'"),
        ):

            def init(self, power=default) -> None: ...

            init.__annotations__["power"] = typed
            odd = type("Odd", (Term,), {"name": "odd", "__init__": init, "__call__": Focal.__call__})
            with pytest.raises(TypeError, match=said):
                register_term(odd, kind="weight")
        with pytest.raises(ValueError, match="weight 'clash' has the config field 'focal_gamma', which is another's"):
            register_term(Clash, kind="weight")
        with pytest.raises(ValueError, match=r"the weight 'score-gap' is taken by .*ScoreGapWeight"):
            register_term(Taken, kind="weight")
        with pytest.raises(ValueError, match="unknown kind of term 'weights'; known: weight, margin"):
            register_term(Focal, kind="weights")

    def test_an_option_that_is_a_field_already(self):
        class Score(Focal):
            name = "score"
            option_prefix = "score_gap_"

            def __init__(self, threshold: float = 1.0) -> None: ...

        with pytest.raises(ValueError, match="weight 'score' has the config field 'score_gap_threshold'"):
            register_term(Score, kind="weight")
        assert config_class(None, "cpo") is MarginCPOConfig

    @pytest.mark.parametrize("name", ["my term", "s/l", "a.b", "", "1st"])
    def test_a_name_is_one_word(self, name):
        with pytest.raises(TypeError, match="Use letters, digits, - and _"):
            register_term(type("Named", (Focal,), {"name": name}), kind="weight")

    def test_the_same_code_again(self):
        """As a notebook runs it: the second class takes the place of the first."""

        def cell(default: float) -> type[Term]:
            class Again(Focal):
                name = "again"

                def __init__(self, rate: float = default) -> None:
                    self.rate = rate

            return register_term(Again, kind="weight")

        cell(1.0)
        second = cell(2.0)
        assert registry.term_class("weight", "again") is second
        assert registry.OPTIONS["again_rate"][1].default == 2.0

    def test_a_dataclass_with_a_factory_and_choices(self, tmp_path):
        @dataclasses.dataclass
        class Layered(Focal):
            layers: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
            mode: Literal["near", "far"] = "near"
            name = "layered"

        class Sided(Focal):
            name = "sided"

            def __init__(self, side: Literal["left", "right"]) -> None:
                self.side = side

        register_term(Sided, kind="weight")  # without a default: no choice of those that do not name it

        register_term(Layered, kind="weight")
        config = config_class(None, "cpo")(**quiet(output_dir=str(tmp_path), weight="layered"))
        assert config.layered_layers == [1, 2]
        assert config.terms("weight")[0].layers == [1, 2]
        json.loads(config.to_json_string())
        with pytest.raises(ValueError, match="unknown layered_mode 'fra'; known: near, far"):
            config_class(None, "cpo")(**quiet(output_dir=str(tmp_path), weight="layered", layered_mode="fra"))

    def test_it_trains_and_is_logged(self, tiny_model, tokenizer, tmp_path):
        register_term(Focal, kind="weight")
        args = MarginCPOConfig(**quiet(output_dir=str(tmp_path), weight=["focal", "score-gap"], focal_gamma=1.0))
        rows = preference_rows(8)
        trainer = MarginCPOTrainer(load(tiny_model), args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        logged = next(entry for entry in trainer.state.log_history if "weights/mean" in entry)
        assert 0 < logged["weights/focal/mean"] < 1
        assert logged["weights/score-gap/max"] > 1


def test_an_unknown_name_lists_the_registered():
    register_term(Focal, kind="weight")
    with pytest.raises(ValueError, match=r"unknown weight 'focale'; known: .*focal; did you mean 'focal'\?"):
        config(weight="focale")


class TestRewardsAndLinks:
    @pytest.mark.parametrize("base", ["cpo", "dpo"])
    def test_a_reward_by_name(self, base, tiny_model, tokenizer, tmp_path):
        """Half of the rewards at twice the β is the same loss."""
        register_reward(Half)
        cls = {"cpo": MarginCPOTrainer, "dpo": MarginDPOTrainer}[base]
        options = {"loss_type": "simpo", "cpo_alpha": 0.0} if base == "cpo" else {"simpo_gamma": 0.5}
        losses = []
        for own in (
            {"reward": "half", "half_factor": 0.25, "beta": 8.0},
            {"reward": "length-normalized", "beta": 2.0},
        ):
            args = config_class(None, base)(**quiet(output_dir=str(tmp_path), **options, **own))
            trainer = cls(load(tiny_model), args=args, train_dataset=preference_rows(6), processing_class=tokenizer)
            assert getattr(trainer, "ref_model", None) is None
            losses.append(loss_and_gradients(trainer, first_batch(trainer))[0])
        torch.testing.assert_close(*losses)

    @pytest.mark.parametrize("base", ["cpo", "dpo"])
    def test_a_link_by_name(self, base, tiny_model, tokenizer, tmp_path):
        register_link(SQUARED)
        cls = {"cpo": MarginCPOTrainer, "dpo": MarginDPOTrainer}[base]
        settings = {"loss_type": "squared", "reward": "length-normalized", "beta": 2.0, "gamma_beta_ratio": 0.5}
        settings |= {"cpo_alpha": 0.0} if base == "cpo" else {}
        args = config_class(None, base)(**quiet(output_dir=str(tmp_path), **settings))
        trainer = cls(load(tiny_model), args=args, train_dataset=preference_rows(6), processing_class=tokenizer)
        assert (list(trainer.objective.links), trainer.objective.gamma) == ([SQUARED], 1.0)
        batch = first_batch(trainer)
        gap = 2.0 * trainer.score_gap(trainer.forward_pairs(trainer.before_measuring(batch)))
        loss, _ = loss_and_gradients(trainer, batch)
        torch.testing.assert_close(loss, ((1 - (gap - 1.0)).clamp(min=0) ** 2).mean().detach())

    def test_the_names_that_trl_has_are_taken(self):
        with pytest.raises(ValueError, match="loss_type of the CPO base 'sigmoid' is taken"):
            register_link(dataclasses.replace(SQUARED, name="sigmoid"))
        with pytest.raises(ValueError, match="unknown loss_type 'square'; known: sigmoid"):
            config(loss_type="square")
        with pytest.raises(ValueError, match="unknown reward 'halve'; known: length-normalized"):
            config(reward="halve")

    def test_a_reference_is_not_to_be_had_on_cpo(self, tiny_model, tokenizer, tmp_path):
        with pytest.raises(ValueError, match=r"'log-ratio' reads .*, which CPOTrainer does not have"):
            objective_of(config(reward="log-ratio"))

    def test_an_option_of_a_link_is_a_field(self, caplog):
        link = register_link(dataclasses.replace(TILTED), "cpo")
        assert register_link(link, "dpo") is link
        for cls in (config_class("gappo"), config_class("dpo"), MarginCPOConfig, MarginDPOConfig):
            assert config(cls).tilted_by == 0.5
        assert not caplog.text
        for made in (
            config(loss_type="tilted", tilted_by=-1.5),
            config(MarginDPOConfig, loss_type="tilted", tilted_by=-1.5),
            parse(["--method", "none", "--loss_type", "tilted", "--tilted_by", "-1.5", "--use_cpu"])[1],
        ):
            assert pickle.loads(pickle.dumps(made)).tilted_by == -1.5
            assert objective_of(made)(ONE_PAIR).losses.item() == pytest.approx(-1.5 * 0.1 * (-6.0 - -7.0))
        config(tilted_by=2.0)
        assert "no effect of tilted_by: for loss_type='tilted'" in caplog.text

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ((("dpop_lambda", 1.0),), "the option 'dpop_lambda', which is another's config field already"),
            ((("learning_rate", 1.0),), "the option 'learning_rate', which is another's config field already"),
            ((("focal_gamma", 1.0),), "the option 'focal_gamma', which is another's config field already"),
            ((("tilted_by", "much"),), "the default of 'tilted_by', an option of loss_type 'tilted', must be a fin"),
            ((("tilted-by", 1.0),), "the option 'tilted-by': use letters, digits and _"),
        ],
    )
    def test_an_option_that_cannot_be_a_field(self, options, problem):
        register_term(Focal, kind="weight")
        with pytest.raises(ValueError, match=problem):
            register_link(dataclasses.replace(TILTED, options=options))
        assert "tilted" not in CPO_LINKS

    def test_a_link_with_a_name_of_one_base_is_registered_on_none(self):
        with pytest.raises(ValueError, match="loss_type of the DPO base 'exo_pair' is taken"):
            register_link(dataclasses.replace(SQUARED, name="exo_pair"))
        assert "exo_pair" not in CPO_LINKS


class TestMethods:
    def method(self, **changes: Any) -> Method:
        settings = {"weight": "focal", "defaults": {"beta": 2.0, "gamma_beta_ratio": 0.5, "focal_gamma": 4.0}}
        return Method(
            **{
                "id": "focal-simpo",
                "name": "FocalSimPO",
                "paper": PAPER,
                "formula": "f",
                "reward": "length-normalized",
            }
            | settings
            | changes
        )

    @pytest.mark.parametrize("base", ["cpo", "dpo"])
    def test_its_config_and_trainer(self, base):
        register_term(Focal, kind="weight")
        method = register_method(self.method(keep_best="pwa"))
        made = config(config_class("focal-simpo", base))
        assert (made.weight, made.beta, made.simpo_gamma, made.focal_gamma) == ("focal", 2.0, 1.0, 4.0)
        assert made.method is method
        assert registry.get_method("focal-simpo") is method
        assert "focal-simpo" in registry.method_ids()
        assert trainer_class("focal-simpo", base) is {"cpo": MarginCPOTrainer, "dpo": MarginDPOTrainer}[base]
        twin = pickle.loads(pickle.dumps(made))
        assert type(twin) is type(made)
        assert twin.to_dict() == made.to_dict()

    def test_what_cannot_be_registered(self):
        with pytest.raises(ValueError, match="unknown weight of method 'focal-simpo' 'focal'; known: score-gap"):
            register_method(self.method())
        register_term(Focal, kind="weight")
        with pytest.raises(ValueError, match="unknown reward of method 'focal-simpo' 'mean'"):
            register_method(self.method(reward="mean"))
        with pytest.raises(ValueError, match="the method 'gappo' is taken by"):
            register_method(self.method(id="gappo"))
        with pytest.raises(TypeError, match=r"paper of method '.*' is None: give a Paper"):
            register_method(self.method(paper=None))
        with pytest.raises(TypeError, match=r"defaults of method '.*' is None: give a Mapping"):
            register_method(self.method(defaults=None))
        register_method(self.method(defaults={"focal_gama": 1.0}))
        with pytest.raises(ValueError, match=r"defaults of method 'focal-simpo' name \['focal_gama'\]"):
            config_class("focal-simpo")

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"bases": ()}, r"bases of method 'focal-simpo' must be a tuple of 'cpo' and 'dpo'.*it is \(\)"),
            ({"bases": "dpo"}, "bases of method 'focal-simpo' must be a tuple"),
            ({"bases": ("dpo", "dpo")}, "bases of method 'focal-simpo' must be a tuple"),
            ({"bases": ("kto",)}, "unknown base of method 'focal-simpo' 'kto'; known: cpo, dpo"),
            ({"loss": "sigmod"}, "unknown loss of method 'focal-simpo' on the CPO base 'sigmod'.*mean 'sigmoid'"),
            ({"loss": "robust"}, "unknown loss of method 'focal-simpo' on the CPO base 'robust'"),
            ({"loss": "simpo", "bases": ("dpo",)}, "unknown loss of method 'focal-simpo' on the DPO base 'simpo'"),
            ({"loss": ["sigmoid"]}, "unknown loss of method 'focal-simpo'"),
            ({"reward": "log-ratio"}, r"'log-ratio', which reads a reference model.*let its bases be \('dpo',\)"),
            ({"margin": "alpha-dpo"}, "'alpha-dpo', which reads a reference model"),
        ],
    )
    def test_loss_and_bases_are_checked(self, changes, problem):
        with pytest.raises(ValueError, match=problem):
            register_method(self.method(weight=None, defaults={}, **changes))
        assert "focal-simpo" not in registry.method_ids()

    def test_a_base_that_cannot_carry_it(self):
        register_method(self.method(weight=None, defaults={}, loss="simpo", bases=("cpo",)))
        with pytest.raises(ValueError, match=r"'focal-simpo' does not go with base 'dpo': .* take base 'cpo'"):
            config_class("focal-simpo", "dpo")
        with pytest.raises(ValueError, match=r"'dpo' needs a reference model, which CPOTrainer .* take base 'dpo'"):
            config_class("dpo", "cpo")

    def test_several_terms(self):
        register_term(Focal, kind="weight")
        register_method(self.method(weight=("score-gap", "focal")))
        made = config(config_class("focal-simpo"))
        assert made.weight == ["score-gap", "focal"]
        assert made.method is not None
        assert config(config_class("focal-simpo"), weight="focal").method is None


class TestPlugins:
    @pytest.fixture
    def plugins(self, monkeypatch):
        """Installs entry points: name → what loading it does."""
        registry.load_plugins.cache_clear()
        loaded = []

        def install(**points: Callable[[], Any]) -> list[str]:
            class Point:
                def __init__(self, name, action):
                    self.name = self.value = name
                    self.action = action

                def load(self):
                    loaded.append(self.name)
                    self.action()

            made = [Point(name, action) for name, action in points.items()]
            monkeypatch.setattr(registry, "entry_points", lambda group: made if group == registry.GROUP else [])
            return loaded

        yield install
        registry.load_plugins.cache_clear()
        registry._failed.clear()

    def test_they_are_loaded_when_a_name_is_not_known(self, plugins):
        loaded = plugins(focal=lambda: register_term(Focal, kind="weight"))
        config(GapPOConfig, score_gap_threshold=1.0)
        assert not loaded
        assert config(weight="focal", focal_gamma=1.5).terms("weight") == (Focal(1.5),)
        assert loaded == ["focal"]
        assert "focal" in registry.term_names("weight")
        assert loaded == ["focal"]  # once

    def test_a_link_with_an_option_is_loaded_by_its_name(self, plugins):
        plugins(tilted=lambda: register_link(TILTED))
        assert config(loss_type="tilted").tilted_by == 0.5
        assert config(MarginDPOConfig, loss_type=["tilted", "sigmoid"], tilted_by=2.0).tilted_by == 2.0

    def test_a_reward_with_an_option_is_loaded_by_its_name(self, plugins):
        plugins(half=lambda: register_reward(Half))
        assert config(reward="half").half_factor == 0.5

    def test_the_command_line_has_their_methods_and_options(self, plugins, tmp_path):
        def load_focal():
            register_term(Focal, kind="weight")
            method = Method("theirs", "Theirs", PAPER, "loss", reward="length-normalized", defaults={}, weight="focal")
            register_method(method)

        plugins(focal=load_focal)
        given = parse(["--method", "theirs", "--focal_gamma", "3", "--use_cpu"])[1]
        assert given.terms("weight") == (Focal(3.0),)
        (tmp_path / "c.yaml").write_text("method: none\nweight: [score-gap, focal]\nfocal_gamma: 4\n")
        given = parse(["--config", str(tmp_path / "c.yaml"), "--use_cpu"])[1]
        assert given.terms("weight") == (ScoreGapWeight(), Focal(4.0))
        with pytest.raises(ValueError, match=r"unknown option '--focal_gama' \(did you mean '--focal_gamma'\?\)"):
            parse(["--method", "theirs", "--focal_gama", "3"])
        with pytest.raises(ValueError, match=r"unknown method 'thiers'; known: gappo.*did you mean 'theirs'"):
            parse(["--method", "thiers"])

    def test_one_that_is_broken_stops_only_who_needs_it(self, plugins, caplog):
        def broken():
            raise ImportError("no module named 'flax'")

        plugins(bad=broken, focal=lambda: register_term(Focal, kind="weight"))
        assert config(weight="focal").terms("weight")
        assert "the plugin 'bad' (bad) cannot be loaded: no module named 'flax'" in caplog.text
        with pytest.raises(
            ValueError, match=r"unknown weight 'bad-one'.*the plugin bad could not be loaded: no module"
        ):
            config(weight="bad-one")


class TestObjectiveFromPython:
    def test_it_is_the_whole_objective(self, tiny_model, tokenizer, tmp_path):
        """The config's own, given as an object, is the same loss."""
        rows, settings = preference_rows(6), quiet(output_dir=str(tmp_path), cpo_alpha=0.0)
        objective = Objective(LengthNormalizedReward(), CPO_LINKS["simpo"], 2.0, gamma=1.0, weight=ScoreGapWeight())
        given = MarginCPOTrainer(
            load(tiny_model),
            MarginCPOConfig(**settings),
            train_dataset=rows,
            processing_class=tokenizer,
            objective=objective,
        )
        named = MarginCPOTrainer(
            load(tiny_model),
            MarginCPOConfig(**settings, loss_type="simpo", beta=2.0, simpo_gamma=1.0, weight="score-gap"),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        batch = first_batch(named)
        assert torch.equal(loss_and_gradients(given, batch)[0], loss_and_gradients(named, batch)[0])

    def test_without_terms_trl_does_not_compute_it(self, tiny_model, tokenizer, tmp_path):
        objective = Objective(LengthNormalizedReward(), SQUARED, 2.0)
        args = MarginDPOConfig(**quiet(output_dir=str(tmp_path), share_prompt="never"))
        trainer = MarginDPOTrainer(
            load(tiny_model),
            args=args,
            train_dataset=preference_rows(6),
            processing_class=tokenizer,
            objective=objective,
        )
        assert trainer.ref_model is None
        batch = first_batch(trainer)
        assert not trainer.runs_trl
        gap = 2.0 * trainer.score_gap(trainer.forward_pairs(trainer.before_measuring(batch)))
        loss, _ = loss_and_gradients(trainer, batch)
        torch.testing.assert_close(loss, ((1 - gap).clamp(min=0) ** 2).mean().detach())

    def test_nothing_beside_it(self, tiny_model, tokenizer, tmp_path, caplog):
        objective = Objective(LengthNormalizedReward(), CPO_LINKS["simpo"], 2.0)
        common = {"train_dataset": preference_rows(4), "processing_class": tokenizer, "objective": objective}
        args = MarginCPOConfig(**quiet(output_dir=str(tmp_path), beta=3.0))
        with pytest.raises(ValueError, match="objective does not go with weight_term: the objective has the weight"):
            MarginCPOTrainer(load(tiny_model), args, weight_term=ScoreGapWeight(), **common)
        with pytest.raises(ValueError, match="objective does not go with GapPOTrainer"):
            trainer_class("gappo")(load(tiny_model), GapPOConfig(**quiet(output_dir=str(tmp_path))), **common)
        MarginCPOTrainer(load(tiny_model), args, **common)
        assert "no effect of beta: the trainer was given an objective" in caplog.text


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GapPO", "'gappo' (GapPO)"),
        ("GAPPO", "'gappo' (GapPO)"),
        ("GaPO", "'gap-aware' (GaPO)"),
        ("gapo", "'gap-aware' (GaPO) or 'geometric-anchor' (GAPO)"),
    ],
)
def test_a_method_by_its_name_is_not_guessed(name, meant):
    """The names of three papers differ by the letters' case alone."""
    with pytest.raises(ValueError, match=rf"unknown method '{name}'; known: gappo, .*; did you mean ") as refused:
        registry.get_method(name)
    assert str(refused.value).endswith(f"did you mean {meant}?")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"options": {"tilt": 1.0}}, r"has the options \{'tilt': 1.0\}: give a tuple of names with their defaults"),
        ({"options": ("tilt",)}, r"the link 'odd' has the options \('tilt',\): give"),
        ({"columns": "agreement"}, "the link 'odd' has columns='agreement': give a tuple of names"),
        ({"columns": None}, "the link 'odd' has columns=None: give a tuple of names"),
        ({"name": " "}, "a link is called ' ': give it a name, for loss_type"),
        ({"name": None}, "a link is called None: give it a name"),
        ({"function": 3}, "the function of the link 'odd' is 3: give one of LossInputs"),
    ],
)
def test_parts_of_a_link_of_another_kind(options, said):
    with pytest.raises(TypeError, match=said):
        Link(**{"name": "odd", "function": lambda x: x.reward_gap, **options})
