"""`trl-margins compare`: the same budget for all methods, and a table that the run folders bear out."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import yaml
from conftest import preference_rows
from datasets import Dataset, DatasetDict
from said import hear, word_for_word  # noqa: F401 - its messages are held against said/
from scipy import stats
from transformers import TrainerCallback

from trl_margins.cli import compare, compare_runs, compare_settings, main, train
from trl_margins.cli.compare_settings import MEASURED
from trl_margins.methods import METHODS
from trl_margins.pairs import ROW
from trl_margins.report import figures
from trl_margins.report.run_folder import read_pairs
from trl_margins.trainers.configs import config_class

pytestmark = [pytest.mark.rehearsal, pytest.mark.usefixtures("few_objects_to_collect")]

METRICS = ("eval_pwa", "eval_pwa_all", "eval_spearman")
BUDGET = ("learning_rate", "gradient_accumulation_steps", "per_device_train_batch_size", "max_length")


@pytest.fixture(scope="module", autouse=True)
def one_picture() -> Iterator[None]:
    """In each report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "PICTURES", figures.PICTURES[:1])
        yield


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory) -> dict[str, Any]:
    """What a base config says."""
    folder = tmp_path_factory.mktemp("data")
    preference_rows(24).to_json(folder / "pairs.jsonl")
    preference_rows(40, seed=5).to_json(folder / "eval.jsonl")
    preference_rows(24).remove_columns(["score_chosen", "score_rejected"]).to_json(folder / "unscored.jsonl")
    return {
        "model_name_or_path": tiny_model,
        "dataset_name": str(folder / "pairs.jsonl"),
        "eval_dataset_name": str(folder / "eval.jsonl"),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "max_length": 128,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def words(folder: Path, settings: dict[str, Any], *methods: str) -> list[str]:
    """The command, with the settings in a file."""
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    return ["compare", "--config", str(folder / "base.yaml"), "--out", str(folder / "out"), "--methods", *methods]


def numbers(out: Path, method: str, seed: int, rate: str = "0.01") -> dict[str, float]:
    return json.loads((out / f"{method}-lr{rate}-seed{seed}" / "eval_results.json").read_text())


def cells(text: str, method: str) -> list[str]:
    """Of a method's row."""
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {method} "))
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.fixture(scope="module")
def compared(base, tmp_path_factory) -> tuple[list[str], Path, str]:
    """Two methods and two seeds: the command, the folder, and what was printed."""
    folder, said = tmp_path_factory.mktemp("compared"), io.StringIO()
    command = [*words(folder, base, "dpo", "gappo"), "--seeds", "1", "2"]
    with redirect_stdout(said):
        assert main(command) == 0
    return command, folder / "out", said.getvalue()


# The table


def test_the_table_is_that_of_the_runs(compared, base):
    """By hand: NumPy's means and SciPy's intervals of what each run folder's own file says."""
    _, out, printed = compared
    found = {
        method: np.array([[numbers(out, method, seed)[name] for name in METRICS] for seed in (1, 2)])
        for method in ("dpo", "gappo")
    }
    assert len({tuple(row) for rows in found.values() for row in rows}) == 4  # no two runs are the same
    for method, values in found.items():
        expected = [method, "0.01", "2"]
        for own, difference in zip(values.T, (values - found["dpo"]).T, strict=True):
            expected += [cell(own, ""), "–" if method == "dpo" else cell(difference, "+")]
        assert cells(printed, method) == expected
        assert f"| {' | '.join(expected)} |" in " ".join((out / "compare.md").read_text().split())
    (_, row) = json.loads((out / "results.json").read_text())["table"]
    assert row["eval_pwa_all"]["mean"] == pytest.approx(found["gappo"][:, 1].mean())
    assert "over seeds 1, 2." in printed
    evaluated = [json.loads(row) for row in Path(base["eval_dataset_name"]).read_text().splitlines()]
    gaps = np.array([row["score_chosen"] - row["score_rejected"] for row in evaluated])
    assert f"The numbers are of 40 pairs, {(gaps >= 2).sum()} of them with a score gap ≥ 2.\n" in printed
    for n in (40, (gaps >= 2).sum()):
        assert f"± {stats.norm.ppf(0.975) * stats.binom.std(n, 0.5) / n:.2f} with {n} pairs" in printed


def cell(values: np.ndarray, sign: str) -> str:
    mean, half = values.mean(), stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    if np.ptp(values) < 1e-9:
        return f"{mean:{sign}.4f}, same in all seeds"
    return f"{mean:{sign}.4f} ± {half:.4f}".replace("-0.0000", "+0.0000" if sign else "0.0000")


def test_how_wide_an_interval_is_said_to_be():
    """From what four decimals round up to 0.0001; and below, by its size."""
    said = {5e-5: "0.0001", 4.9e-5: "5e-05", 0.01234: "0.0123", None: None, 0.0: None}
    for half, text in said.items():
        cell = compare._cell({"mean": -1e-9, "half_width": half})
        same = ", same in all seeds" if half == 0 else ""
        assert cell == (f"0.0000 ± {text}" if text else f"0.0000{same}")
    assert compare._cell(None) == "–"


@pytest.fixture(autouse=True, scope="module")
def defaults_as_they_are() -> None:
    """The pages' tests compare with others, and they are kept."""
    compare_settings._untouched.cache_clear()


def made_up(*flags: str, **options: Any) -> compare.Comparison:
    """A comparison whose numbers follow from method, seed and rate. `options`: what its runs were like."""
    comparison, _ = compare.plan([*flags, *WHERE])
    for number, entry in enumerate(comparison.entries):
        for seed in comparison.seeds:
            for rate in comparison.rates_of(entry) if seed == comparison.seeds[0] else [comparison.best_rate(entry)]:
                run, value = comparison.run(entry, seed, rate), 0.5 + number / 10 + seed / 100 - rate
                found = {"eval_pwa": value, "eval_pwa_all": value - 0.01 * seed, "eval_spearman": 2 * value - 1}
                found |= {"eval_n_pairs": 40, "eval_n_pairs_gap": 25, "eval_loss": 1.0}
                changed = options.get(entry.method, {})
                comparison.done[run] = {} if changed is None else {**found, **changed}
    comparison.facts = {"evaluation set": options.get("rows", "40 rows (12345678)")}
    return comparison


MADE_UP: dict[str, tuple[str, dict[str, Any]]] = {
    "one seed": ("--methods simpo gappo --seeds 3", {}),
    "seeds": ("--methods simpo:beta=3 gappo orpo --seeds 1 2 3 --eval_min_score_gap 1.5", {}),
    "rates": ("--methods gappo simpo --seeds 1 2 --learning_rates 0.02 0.01 0.03 --eval_strategy epoch", {}),
    "own rates": ("--methods simpo:learning_rate=0.02 gappo orpo --learning_rates 0.01 0.03", {}),
    "own rates alone": ("--methods simpo:learning_rate=0.02 gappo:learning_rate=0.01 --learning_rates 0.1 0.3", {}),
    "another metric": (
        "--methods gappo dpo --seeds 1 2 --learning_rates 0.2 0.01 --eval_strategy epoch --metric_for_best_model loss",
        {},
    ),
    "spearman": (
        "--methods simpo dpo --learning_rates 0.2 0.01 --eval_strategy epoch --metric_for_best_model eval_spearman",
        {"dpo": {"eval_spearman": -0.5}},
    ),
    "some keep the best": (
        "--methods simpo simpo:load_best_model_at_end=true amapo:learning_rate=0.5 --eval_strategy epoch",
        {"rows": "first 1000 rows (12345678)"},
    ),
    "other pairs": ("--methods simpo gappo --seeds 1 2", {"gappo": {"eval_n_pairs": 39, "eval_n_pairs_gap": 24}}),
    "rows left out": ("--methods simpo gappo", {"rows": "43 rows (12345678)"}),
    "fewer rows than pairs": ("--methods simpo gappo", {"rows": "39 rows (12345678)"}),
    "diverged": ("--methods simpo gappo --seeds 1 2", {"gappo": None}),
    "the first one diverged": ("--methods simpo gappo", {"simpo": None}),
    "all diverged": ("--methods simpo gappo", {"simpo": None, "gappo": None}),
}


@pytest.mark.parametrize("case", MADE_UP)
def test_all_words_of_a_comparison(case):
    """Before training and afterwards, and what is written as JSON."""
    flags, options = MADE_UP[case]
    comparison = made_up(*flags.split(), **options)
    hear("\n".join([comparison.preface, *comparison.notes_on_rate, comparison.text]))
    hear(json.dumps(json.loads(json.dumps(comparison.rows()), parse_float=lambda text: round(float(text), 6))))


def test_all_words_where_no_pair_has_the_gap():
    """And where a run failed, or one of two has no pair with the gap."""
    for methods in (("simpo", "gappo"), ("gappo",)):
        comparison = made_up("--methods", "simpo", "gappo", "--eval_strategy", "epoch")
        for run, found in comparison.done.items():
            if run.entry.method in methods:
                del found["eval_pwa"], found["eval_n_pairs_gap"]
        comparison.first.metric_for_best_model = "pwa"
        hear(comparison.text)
    first = next(iter(comparison.done))
    comparison.failed[first] = ValueError("wrong\n  twice")
    del comparison.done[first]
    hear(comparison.text)


def test_a_run_s_words_and_place(base, tmp_path, monkeypatch, capsys):
    """Of each kind of run: done before, trained, diverged, failed; and what the numbers are written as."""
    comparison = made_up("--methods", "simpo", "gappo", "amapo", "orpo", "--out", str(tmp_path), "--run_name", "mine")
    kept = {run.entry.method: (run, found) for run, found in comparison.done.items()}
    comparison.done.clear()
    simpo, found = kept["simpo"]
    simpo.folder.mkdir()
    (simpo.folder / "eval_results.json").write_text(json.dumps(found))

    def quick(argv: list[str], is_part: bool) -> int:
        hear(f"{is_part} {argv}\n{Path(argv[1]).read_text()}{(Path(argv[1]).parent / 'compared.json').read_text()}")
        run, found = next(each for each in kept.values() if str(each[0].folder) in argv[1])
        if run.entry.method == "gappo":
            raise FloatingPointError("too large")
        if run.entry.method == "amapo":
            (run.folder / "eval_results.json").write_text(json.dumps({**found, "eval_spearman": 0.25}))
        return 0

    monkeypatch.setattr(train, "main", quick)
    monkeypatch.setattr(compare, "perf_counter", lambda: 1.0)
    monkeypatch.setattr("trl_margins.report.run_folder.read_runs", lambda folders: hear(f"report of {folders}"))
    monkeypatch.setattr(
        "trl_margins.report.page.write_report", lambda runs, folder: [folder / "page", folder / "more"]
    )
    comparison.train()
    comparison.write()
    hear(capsys.readouterr().out)
    hear((tmp_path / "results.json").read_text())
    hear((tmp_path / "compare.md").read_text())
    assert [run.folder.name for run in comparison.done] == [f"{m}-lr1e-06-seed42" for m in ("simpo", "gappo", "amapo")]


def test_rows_that_json_does_not_know_have_a_digest(tmp_path):
    rows = Dataset.from_dict({"at": [datetime(2026, 1, 1), datetime(2026, 1, 2)]})
    assert re.fullmatch(r"2 rows \([0-9a-f]{8}\)", compare_runs._digest_of_rows(rows))
    assert compare_runs._digest_of_rows(rows) != compare_runs._digest_of_rows(rows.select([1, 0]))


def test_the_help_has_no_method_of_its_own(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help_all"])
    said = capsys.readouterr().out
    assert "--methods" in said
    assert not re.search(r"--method\b", said)


@pytest.mark.parametrize(
    ("values", "said"),
    [([0.2], "+0.2000"), ([0.3 - 0.1, 0.2], "+0.2000, same in all seeds"), ([0.2, 0.200001], "+0.2000 ± 6e-06")],
)
def test_no_interval_is_zero(values, said):
    """Equal numbers of a few seeds are no certainty."""
    assert compare._cell(compare._interval(values), "+") == said
    assert "0.0000" not in said


def test_the_pairs_and_the_metric_that_counted_are_named(base, tmp_path, capsys):
    """No score gap reaches 2, so all pairs choose; and one prompt is too long to be measured."""
    rows = [json.loads(row) for row in Path(base["eval_dataset_name"]).read_text().splitlines()]
    rows = [{**row, "score_chosen": 0.9, "score_rejected": i / 50} for i, row in enumerate(rows)]
    rows[3]["prompt"] = "the dog runs " * 60
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**base, "eval_dataset_name": str(tmp_path / "eval.jsonl"), "log_pairs": False, "max_steps": 2}
    assert main([*words(tmp_path, settings, "gappo"), "--eval_strategy", "steps", "--eval_steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "The numbers are of 39 pairs, 0 of them with a score gap ≥ 2. 1 of 40 rows are in no number: " in said
    assert "± 0.16 with 39 pairs." in said
    assert "checkpoint with the best eval_pwa_all, on" in said
    *_, last = sorted((tmp_path / "out" / "gappo-lr0.01-seed42").glob("checkpoint-*/trainer_state.json"))
    state = json.loads(last.read_text())
    logged = {each["step"]: each["eval_pwa_all"] for each in state["log_history"] if "eval_pwa_all" in each}
    assert state["best_metric"] == max(logged.values()) == logged[state["best_global_step"]]


def test_all_methods_have_the_same_pairs_in_the_same_order_from_the_same_start(compared):
    _, out, _ = compared
    logs = {
        (method, seed): read_pairs(out / f"{method}-lr0.01-seed{seed}" / "pair_log.csv")
        for method in ("dpo", "gappo")
        for seed in (1, 2)
    }
    for seed in (1, 2):
        ours, theirs = logs["dpo", seed], logs["gappo", seed]
        np.testing.assert_array_equal(ours[ROW], theirs[ROW])
        same = np.isclose(ours["logp_chosen"], theirs["logp_chosen"], rtol=1e-6)
        assert same[:4].all()  # of the first step
        assert not same[8:].any()  # the first step is the warm-up's, of length 0
    assert not np.array_equal(logs["dpo", 1][ROW], logs["dpo", 2][ROW])


def test_a_run_s_folder_is_train_s(compared, base, tmp_path):
    """`evaluate` measures the same of its model; the report draws it; its own command makes it again."""
    _, out, printed = compared
    folder = out / "gappo-lr0.01-seed1"
    given = ["--model_name_or_path", str(folder), "--dataset_name", base["eval_dataset_name"], "--bootstrap", "10"]
    assert main(["evaluate", *given, "--json", str(tmp_path / "numbers.json")]) == 0
    (report,) = json.loads((tmp_path / "numbers.json").read_text())["sets"].values()
    for name in METRICS:
        assert report[name.removeprefix("eval_")] == pytest.approx(numbers(out, "gappo", 1)[name])
    assert str(out / "report" / "report.html") in printed
    assert "dpo-lr0.01-seed1" in (out / "report" / "report.html").read_text()
    assert f"trl-margins train --config {folder / 'run.yaml'}\n" in (folder / "README.md").read_text()


def test_what_is_done_is_not_done_again(compared, monkeypatch, capsys):
    command, _, printed = compared
    monkeypatch.setattr(train, "main", lambda argv, is_part: pytest.fail(f"trains again: {argv}"))
    assert main(command) == 0
    again = capsys.readouterr().out
    assert again.count("done before") == 4
    assert again.split("\n\n")[-2:] == printed.split("\n\n")[-2:]  # the table and what follows


def test_other_settings_do_not_mix(compared, base, tmp_path):
    command, _, _ = compared
    words(tmp_path, {**base, "max_steps": 4, "weight_decay": 0.1})
    changed = [str(tmp_path / "base.yaml") if word.endswith("base.yaml") else word for word in command]
    with pytest.raises(ValueError, match=r"dpo-lr0.01-seed1 .*max_steps 3 → 4, weight_decay 0.0 → 0.1"):
        main(changed)
    (tmp_path / "out" / "dpo-lr0.01-seed42").mkdir(parents=True)
    (tmp_path / "out" / "dpo-lr0.01-seed42" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="seed42 is not of a comparison"):
        main(words(tmp_path, base, "dpo"))


@pytest.mark.parametrize("methods", [("gappo", "simpo", "dpo"), ("simpo", "gappo", "dpo")])
def test_another_first_method_has_other_defaults(methods, base, tmp_path, monkeypatch):
    """Nobody set them: the error says so, and its flags go on with the same runs."""
    trained = []

    def quick(argv: list[str], is_part: bool) -> None:
        trained.append(Path(argv[1]).parent)
        (trained[-1] / "eval_results.json").write_text(json.dumps({"eval_pwa_all": 0.5, "eval_n_pairs": 40}))

    monkeypatch.setattr(train, "main", quick)
    left = ("max_length", "gradient_accumulation_steps")
    settings = {name: value for name, value in base.items() if name not in left} | {"eval_strategy": "epoch"}
    first, *others = methods
    assert main([*words(tmp_path, {**settings, "log_pairs": False}, *methods)]) == 0
    again = words(tmp_path, {**settings, "log_pairs": False}, *others, first)
    with pytest.raises(ValueError, match=r"max_length .*Nobody set this: it is the first method's default") as error:
        main(again)
    flags = str(error.value).partition("To go on: ")[2].split()
    assert str(METHODS[first].defaults["max_length"]) == flags[flags.index("--max_length") + 1]
    assert main([*again, *flags]) == 0
    assert len(trained) == 3
    with pytest.raises(ValueError, match=r"or remove this one$"):  # somebody set this
        main([*again, *flags, "--max_steps", "4"])


def copy_of(data: str, folder: Path) -> str:
    return str(shutil.copy(data, folder))


def test_other_rows_do_not_mix(base, tmp_path, monkeypatch):
    """Under the same name; a copy of the same rows is the same, whenever it was written."""
    monkeypatch.setattr(compare_runs, "__version__", "0.1")
    sets = {name: copy_of(base[name], tmp_path) for name in ("dataset_name", "eval_dataset_name")}
    command = [*words(tmp_path, {**base, **sets, "log_pairs": False}, "amapo"), "--max_steps", "1"]
    assert main(command) == 0
    monkeypatch.setattr(train, "main", lambda argv, is_part: pytest.fail(f"trains again: {argv}"))
    for name in sets:
        rows = Path(base[name]).read_text().splitlines(keepends=True)
        Path(sets[name]).write_text("".join(rows))
        os.utime(sets[name], (1, 1))
        assert main(command) == 0
        what = "training set" if name == "dataset_name" else "evaluation set"
        for changed in (rows[:12], [*rows[:-1], rows[0]]):
            Path(sets[name]).write_text("".join(changed))
            said = rf"another run \({what} {len(rows)} rows \(\w+\) → {len(changed)} rows \(\w+\)\)"
            with pytest.raises(ValueError, match=said):
                main(command)
        Path(sets[name]).write_text("".join(rows))
    monkeypatch.setattr(compare_runs, "__version__", "0.0")
    with pytest.raises(ValueError, match=r"another run \(version 0.1 → 0.0\)"):
        main(command)


def test_another_model_under_the_same_name_does_not_mix(base, tmp_path):
    """Nor another template."""
    model, template = shutil.copytree(base["model_name_or_path"], tmp_path / "model"), tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    settings = {**base, "model_name_or_path": str(model), "chat_template": str(template)}
    comparison, _ = compare.plan(words(tmp_path, settings, "amapo")[1:])
    (entry,) = comparison.entries
    before = compare_runs.facts_of(entry)
    (model / "README.md").write_text("of nobody's interest")
    assert compare_runs.facts_of(entry) == before
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    template.write_text("{{ messages }}!")
    now = compare_runs.facts_of(entry)
    differ = [name for name in now if now[name] != before[name]]
    assert differ == ["files of model_name_or_path", "files of chat_template"]


def test_a_stream_is_known_by_its_first_rows():
    rows = preference_rows(24)
    assert compare_runs._digest_of_rows(rows.to_iterable_dataset()) == f"first {compare_runs._digest_of_rows(rows)}"


# Runs that stop


class Killed(TrainerCallback):
    """Ends the process in the third step, without a word."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed(command: list[str]) -> None:
    built = train.build_trainer

    def dying(*run: Any) -> Any:
        trainer = built(*run)
        trainer.add_callback(Killed())
        return trainer

    train.build_trainer = dying
    main(command)


def test_a_killed_comparison_goes_on_from_the_checkpoint(compared, base, tmp_path):
    """And the model is that of a run that nobody killed, to the last bit."""
    _, uninterrupted, _ = compared
    settings = {**base, "save_strategy": "steps", "save_steps": 1, "log_pairs": False, "seed": 1}
    command = words(tmp_path, settings, "dpo")
    process = processes.start(_killed, command)  # a fork of this process would wait for threads that it does not have
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    folder = tmp_path / "out" / "dpo-lr0.01-seed1"
    assert (folder / "checkpoint-2").is_dir()
    assert not (folder / "eval_results.json").exists()
    assert main(command) == 0
    assert not (folder / "_previous-1").exists()
    name = "model.safetensors"
    assert (folder / name).read_bytes() == (uninterrupted / folder.name / name).read_bytes()
    # the model was saved, and its numbers were not, or are none
    for damaged in ("{", '{"eval_pwa_all": "0.5"}', "[" * 100_000):
        (folder / "eval_results.json").write_text(damaged)
        assert main(command) == 0
        for key in METRICS:
            assert numbers(tmp_path / "out", "dpo", 1)[key] == numbers(uninterrupted, "dpo", 1)[key]


def test_one_method_s_error_leaves_the_others(base, tmp_path, capsys, monkeypatch):
    built = train.build_trainer

    def out_of_memory(script: Any, *run: Any) -> Any:
        if script.method == "gappo":
            raise RuntimeError("out of memory")
        return built(script, *run)

    monkeypatch.setattr(train, "build_trainer", out_of_memory)
    assert main(words(tmp_path, {**base, "log_pairs": False}, "gappo", "amapo")) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].endswith("gappo, seed 42, learning rate 0.01 failed: out of memory")
    assert "* gappo has no numbers, so there are no differences from it.\n" in said.out
    assert cells(said.out, "gappo")[1:4] == ["–", "0", "–"]
    row = cells(said.out, "amapo")
    assert row[3] == f"{numbers(tmp_path / 'out', 'amapo', 42)['eval_pwa']:.4f}"
    assert row[4] == "–"
    assert "One seed (42): there is no interval" in said.out


def test_data_that_does_not_fit_is_said_before_training(base, tmp_path, monkeypatch):
    """Of all methods at once; the ones that are left can be trained."""
    monkeypatch.setattr(train, "main", lambda argv, is_part: pytest.fail(f"trains: {argv}"))
    settings = {**base, "dataset_name": base["dataset_name"].replace("pairs", "unscored")}
    command = words(tmp_path, settings, "simpo", "gappo", "odpo", "dpo")
    said = r"gappo: 'score-gap' needs annotation scores.*; odpo: 'odpo' needs .*fits these: --methods simpo dpo$"
    with pytest.raises(ValueError, match=said):
        main(command)
    assert not (tmp_path / "out").exists()
    comparison, _ = compare.plan([*command[1:-4], "simpo", "dpo"])
    comparison.check_data()
    with pytest.raises(ValueError, match=r"^'score-gap' needs annotation scores"):
        main(words(tmp_path, settings, "gappo"))
    settings = {**base, "eval_dataset_name": settings["dataset_name"], "metric_for_best_model": "eval_spearman"}
    with pytest.raises(ValueError, match=r"metric_for_best_model='eval_spearman': the evaluation set has no scores"):
        main(words(tmp_path, settings, "simpo", "dpo"))


# Learning rates


def test_each_method_has_its_best_learning_rate(base, tmp_path, capsys):
    command = words(tmp_path, {**base, "log_pairs": False}, "amapo")
    assert main([*command, "--seeds", "1", "2", "--learning_rates", "0.01", "0.05", "--max_steps", "2"]) == 0
    out, said = tmp_path / "out", capsys.readouterr().out
    tried = {rate: numbers(out, "amapo", 1, rate)["eval_pwa_all"] for rate in ("0.01", "0.05")}
    assert len({*tried.values()}) == 2
    best = max(tried, key=lambda rate: tried[rate])
    made = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert made == sorted(["amapo-lr0.01-seed1", "amapo-lr0.05-seed1", f"amapo-lr{best}-seed2"])
    assert cells(said, "amapo")[1:3] == [best, "2"]
    assert "[3/3] amapo, seed 2" in said
    assert "with the best eval_pwa_all of seed 1, on this evaluation set" in said


def test_a_diverged_run_is_the_worst(base, tmp_path, capsys):
    """It has no metrics at all; its method has the other learning rate, and the metric is the same for everybody."""
    settings = {**base, "log_pairs": False, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"metric_for_best_model": "eval_spearman", "load_best_model_at_end": False}
    command = [*words(tmp_path, settings, "amapo", "simpo"), "--warmup_steps", "0"]
    assert main([*command, "--learning_rates", "1e6", "0.01"]) == 0
    out, said = tmp_path / "out", capsys.readouterr().out
    assert "eval_spearman" not in numbers(out, "simpo", 42, "1e+06")  # or this test shows nothing
    for method in ("amapo", "simpo"):
        assert cells(said, method)[1:3] == ["0.01", "1"]
        assert f"* {method}, seed 42, learning rate 1e+06 has no eval_pwa_all, eval_pwa, eval_spearman, as" in said
    assert "with the best eval_spearman of seed 42" in said
    assert main([*command, "--learning_rates", "1e6"]) == 0  # nobody has a number
    assert cells(capsys.readouterr().out, "simpo") == ["simpo", "1e+06", "0"]


def test_a_learning_rate_that_is_not_everybody_s_own_is_said(compared):
    said = "* All methods have learning rate 1e-05, which is not the default of each: dpo 5e-07, simpo 1e-06. With"
    comparison, _ = compare.plan(["--methods", "gappo", "dpo", "simpo", *WHERE])
    assert f"* {comparison.notes_on_rate[0]}".startswith(said)
    _, out, printed = compared
    assert printed.count("All methods have learning rate 0.01, which is not the default of each: dpo 5e-07, ga") == 2
    assert (out / "compare.md").read_text().count("All methods have learning rate 0.01") == 1
    for flags in (["--learning_rates", "1e-6", "1e-5"], ["--methods", "simpo", "amapo"]):
        comparison, _ = compare.plan(["--methods", "gappo", "dpo", *WHERE, *flags])
        assert not comparison.notes_on_rate


def test_a_metric_that_does_not_compare_chooses_no_learning_rate():
    settings = ("--eval_strategy", "epoch", "--learning_rates", "1e-6", "1e-5", "--metric_for_best_model")
    for metric, notes in (("eval_loss", 1), ("eval_spearman", 0)):
        comparison, _ = compare.plan(["--methods", "simpo", "dpo", *WHERE, *settings, metric])
        assert len(comparison.notes_on_rate) == notes
        assert all("chosen by eval_pwa_all and not by eval_loss, which" in each for each in comparison.notes_on_rate)
    assert "if that is eval_pwa, eval_pwa_all or eval_spearman, else by PWA" in " ".join(
        compare.parser().format_help().split()
    )


# Settings


def planned(*command: str) -> dict[str, dict[str, Any]]:
    """What each method's runs would be given."""
    comparison, is_dry = compare.plan([*command, "--dry_run"])
    assert is_dry
    return {entry.method: entry.settings for entry in comparison.entries}


WHERE = ("--model_name_or_path", "m", "--dataset_name", "d", "--eval_dataset_name", "e")


@pytest.mark.parametrize("methods", [("amapo", "gappo", "gamma-po"), ("gappo", "amapo", "gamma-po")])
def test_the_first_method_s_budget_and_everybody_s_own_objective(methods, capsys):
    assert main(["compare", "--methods", *methods, *WHERE, "--dry_run"]) == 0
    comparison, _ = compare.plan(["--methods", *methods, *WHERE])
    first, *_ = (METHODS[name].defaults for name in methods)
    for entry in comparison.entries:
        assert {name: getattr(entry.config, name) for name in BUDGET} == {name: first[name] for name in BUDGET}
        assert entry.config.beta == METHODS[entry.method].defaults["beta"]
        assert entry.config.gamma_beta_ratio == METHODS[entry.method].defaults["gamma_beta_ratio"]
        assert entry.config.load_best_model_at_end is comparison.first.load_best_model_at_end
    said = capsys.readouterr().out
    pairs = first["per_device_train_batch_size"] * first["gradient_accumulation_steps"]
    assert f"{pairs} pairs per optimizer step" in said
    assert f"all have the defaults of {methods[0]}: gradient_accumulation_steps, learning_rate, max_length" in said
    for name in methods:
        (line,) = (line for line in said.splitlines() if line.startswith(f"* {name}: base cpo, reward length-norm"))
        assert f" beta {METHODS[name].defaults['beta']:g}, " in line
        if ratio := METHODS[name].defaults["gamma_beta_ratio"]:
            assert f" gamma_beta_ratio {ratio:g}" in line


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("r-dpo", "r_dpo_alpha 0.05"),
        ("odpo", "odpo_alpha 1"),
        ("madpo", "madpo_c_max 2"),
        ("dr-dpo", "dr_dpo_beta_prime 1"),
        ("alpha-dpo", "alpha_dpo_alpha 0.2"),
        ("beta-dpo", "beta_dpo_a 0.6, beta_dpo_keep 0.8"),
        ("dpop", "dpop_lambda 50"),
        ("focalpo", "focalpo_gamma 0.05"),
        ("cdpo", "label_smoothing 0.1"),
        ("cpo", "cpo_alpha 1"),
        ("orpo", "cpo_alpha 1"),
        ("gappo", "score_gap_transform linear"),
        ("geometric-anchor", "anchor_radius 0.05"),
    ],
)
def test_what_defines_a_method_is_shown(method, said):
    comparison, _ = compare.plan(["--methods", method, *WHERE])
    line, *_ = comparison.preface.splitlines()
    hear(line)
    assert f", {said}" in line
    assert ", loss_type " in line


def test_what_is_the_objective_s_alone():
    """All other options are for all methods. A new option is in one of the two: decide in which."""
    fields = {base: {name for name, row in METHODS.items() if base in row.bases} for base in ("cpo", "dpo")}
    for base, methods in fields.items():
        known = {name for method in methods for name in compare_settings._fields(method, base)}
        hear(f"{base}: {', '.join(sorted(known - compare_settings._OF_ALL))}")
    known = {name for base in fields for name in compare_settings._fields(None, base)}
    assert known > compare_settings._OF_ALL
    names = [name for name in sorted(known) if compare_settings.set_by_the_first(name)]
    hear(f"set by the first: {', '.join(names)}")


def test_all_keep_the_best_checkpoint_or_none():
    """GapPO alone keeps the best by itself."""
    for first, other, keeps in (("gappo", "amapo", True), ("amapo", "gappo", False)):
        comparison, _ = compare.plan(["--methods", first, other, *WHERE, "--eval_strategy", "epoch"])
        for entry in comparison.entries:
            assert entry.config.load_best_model_at_end is keeps
            assert entry.config.metric_for_best_model == ("eval_pwa" if keeps else None)


def test_a_recipe_s_objective_is_its_method_s():
    found = planned("--methods", "amapo", "gappo", "--recipe", "qwen2.5-0.5b-instruct/gappo", "--beta", "4")
    assert [each["beta"] for each in found.values()] == [4.0, 4.0]  # a flag is for all
    found = planned("--methods", "amapo", "gappo", "--recipe", "qwen2.5-0.5b-instruct/gappo")
    assert [each["beta"] for each in found.values()] == [3.0, 1.0]
    assert [each["learning_rate"] for each in found.values()] == [1e-5, 1e-5]
    comparison, _ = compare.plan(["--methods", "amapo", *WHERE, "--recipe", "qwen2.5-0.5b-instruct/gappo"])
    assert "config_full.yaml is for gappo; left out: beta, gamma_beta_ratio" in comparison.preface


@pytest.mark.parametrize(("base", "expected"), [("cpo", ["cpo", "dpo"]), ("dpo", ["dpo", "dpo"])])
def test_a_method_that_needs_a_reference(base, expected):
    """It is trained on its base, whatever base the others have, and options of the reference are for it alone."""
    flags = ("--base", base, "--precompute_ref_log_probs", "true", "--beta", "3", "--max_length", "64")
    found = planned("--methods", "gappo", "dpo", *WHERE, *flags)
    assert [each["base"] for each in found.values()] == expected
    assert "precompute_ref_log_probs" not in found["gappo"]
    assert found["dpo"]["precompute_ref_log_probs"] is True
    assert [(each["beta"], each["max_length"]) for each in found.values()] == [(3.0, 64)] * 2
    with pytest.raises(ValueError, match="precompute_ref_log_probs"):
        planned("--methods", "gappo", *WHERE, *flags)  # nobody else has it


@pytest.mark.parametrize(
    ("methods", "option", "value"),
    [
        (("alphapo", "simpo"), "alpha", 0.5),
        (("simpo", "dpo", "amapo"), "gamma_beta_ratio", 0.3),
        (("simpo", "dpo"), "simpo_gamma", 0.5),
        (("wpo", "dpo"), "use_weighting", True),
        (("cdpo", "dpo", "gappo"), "label_smoothing", 0.2),
        (("simpo-sam", "simpo", "gappo"), "sam_radius", 0.2),
    ],
)
def test_an_option_is_for_the_methods_that_have_it(methods, option, value, tmp_path, capsys):
    """The others are what their names say, to the last field: as if nobody had given it."""
    has, *others = methods
    flags, plain = (f"--{option}", str(value).lower()), planned("--methods", *methods, *WHERE)
    (tmp_path / "base.yaml").write_text(f"{option}: {value}")
    for given in (flags, ("--config", str(tmp_path / "base.yaml"))):
        found = planned("--methods", *methods, *WHERE, *given)
        assert found[has][option] == value
        assert {name: found[name] for name in others} == {name: plain[name] for name in others}
        assert main(["compare", "--methods", *methods, *WHERE, *given, "--dry_run"]) == 0
        assert f"do not have it: {option} ({', '.join(others)})." in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"'{others[0]}': {option} would make another method of it"):
        planned("--methods", *others, *WHERE, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        "--methods dpo cdpo --ld_alpha 0.5",
        "--methods gappo dpo --f_divergence_type js_divergence",
        "--methods alphapo simpo --alpha 0",
        "--methods simpo cpo --cpo_alpha 0.5",
        "--methods gappo amapo --alpha 0.25",
        "--methods gappo amapo --label_smoothing 0.1",
        "--methods gappo amapo --base dpo --use_weighting true",
        "--methods gappo amapo --base dpo --ld_alpha 0.5",
        "--methods gappo amapo --sam_radius 0.05",
    ],
)
def test_an_option_that_makes_another_method_is_refused(flags):
    (option,) = (word for word in flags.split() if word.startswith("--") and word not in ("--methods", "--base"))
    with pytest.raises(ValueError, match=f"{option[2:]} would make another method of it: leave that out"):
        planned(*flags.split(), *WHERE)


# Methods with options of their own


def of_names(*command: str) -> dict[str, dict[str, Any]]:
    """What the runs of each name would be given."""
    comparison, _ = compare.plan([*command, "--dry_run"])
    return {entry.name: entry.settings for entry in comparison.entries}


def test_an_option_of_its_own_is_one_methods_alone():
    """Each is what `train` makes of the method and the flag; the others are as without it."""
    names = ("gamma-po:gamma_po_tau=3", "gamma-po", "simpo:alpha=0.25,beta=4", "gappo:score_gap_normalize=true")
    found = of_names("--methods", *names, *WHERE)
    plain = of_names("--methods", "gamma-po", "simpo", "gappo", *WHERE)
    assert found["gamma-po"] == plain["gamma-po"]
    for name, changed in {
        names[0]: {"gamma_po_tau": 3.0},
        names[2]: {"alpha": 0.25, "beta": 4.0, "simpo_gamma": 4 * 0.55},
        names[3]: {"score_gap_normalize": True},
    }.items():
        assert found[name] == {**plain[name.partition(":")[0]], **changed}


def test_an_option_of_its_own_goes_before_what_all_share(tmp_path, caplog):
    (tmp_path / "base.yaml").write_text("num_train_epochs: 2\nmax_length: 64\n")
    names = ("gappo:num_train_epochs=5,max_length=32", "amapo", "amapo:max_length=48,train_only=up_proj,down_proj")
    given = (*WHERE, "--config", str(tmp_path / "base.yaml"), "--num_train_epochs", "3")
    comparison, _ = compare.plan(["--methods", *names, *given])
    configs = [entry.config for entry in comparison.entries]
    assert [each.num_train_epochs for each in configs] == [5, 3, 3]
    assert [each.max_length for each in configs] == [32, 64, 48]
    assert configs[2].train_only == ["up_proj", "down_proj"]
    assert "The same for all, but for what the names say: " in comparison.preface
    assert "num_train_epochs 3; " in comparison.preface
    compare.plan(["--methods", *names, *given, "--max_steps", "9"])
    assert "gappo:num_train_epochs=5,max_length=32: num_train_epochs has no effect beside max_steps 9" in caplog.text
    # the first method's own budget is not lent to the others: GapPO's batch is 16, whatever this one's is
    comparison, _ = compare.plan(["--methods", "gappo:gradient_accumulation_steps=1", "amapo", *WHERE])
    assert [entry.config.gradient_accumulation_steps for entry in comparison.entries] == [1, 8]


def test_a_base_of_its_own():
    found = of_names("--methods", "gamma-po", "gamma-po:base=dpo,reward=mean-log-ratio", *WHERE)
    assert [each["base"] for each in found.values()] == ["cpo", "dpo"]
    assert [each.get("reward") for each in found.values()] == [None, "mean-log-ratio"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gappo:beta", "'beta' is no option: write METHOD:NAME=VALUE"),
        ("gappo:", "'' is no option"),
        ("gappo:beta=", "'beta=' is no option"),
        ("gappo:beta=1,beta=2", "'beta=2' is no option: .* each name once"),
        ("gappo:score_gap=1", "method 'gappo:score_gap=1': .*--score_gap"),
        ("gappo:gamma_po_tau=-1", "gamma_po_tau"),
        ("gapo:beta=1", "unknown method 'gapo'"),
        ("gappo:dataset_name=x", "dataset_name cannot be of one method: name data and evaluation once, for all"),
        ("gappo:model_name_or_path=x", "model_name_or_path cannot be of one method: all methods have the same start"),
        ("gappo:seed=1", "seed cannot be of one method: --seeds"),
        ("dpo:base=cpo", "method 'dpo' needs a reference model"),
        ("gappo:base=dppo", "unknown base 'dppo'.*; did you mean 'dpo'"),
        ("gappo:seed=1,hub_token=hf_x", "--methods gappo: hub_token has a secret"),
        (
            "gappo:hub_token=x",
            "--methods gappo: hub_token has a secret, and the options of a method name folders: give",
        ),
        ('gappo:model_init_kwargs={"token": "x"}', "model_init_kwargs has a secret"),
        ("gappo:output_dir=x", "output_dir cannot be of one method: name the folder of all runs with --out"),
    ],
)
def test_what_no_method_has_for_itself(name, said):
    with pytest.raises(ValueError, match=said):
        compare.plan(["--methods", "gappo", name, *WHERE])


def test_methods_with_options_are_trained_and_told_apart(base, tmp_path, capsys):
    """Two learning rates for one method, and one of its own for the other, which keeps its last model."""
    other = "gappo:learning_rate=0.02,load_best_model_at_end=false,noise=random:0.25"
    command = [*words(tmp_path, {**base, "log_pairs": False}, "gappo", other), "--eval_strategy", "steps"]
    command += ["--eval_steps", "1", "--learning_rates", "0.005", "0.01"]
    assert main(command) == 0
    said = capsys.readouterr().out
    names = sorted(folder.name for folder in (tmp_path / "out").iterdir() if folder.is_dir())
    assert names == [
        "gappo-learning_rate=0.02,load_best_model_at_end=false,noise=random-0.25-lr0.02-seed42",
        *("gappo-lr0.005-seed42", "gappo-lr0.01-seed42"),
    ]
    assert cells(said, other)[1:3] == ["0.02", "1"]
    assert "The model of gappo is its run's checkpoint with the best" in said
    assert "Each other model is that of its run's last step." in said
    run = yaml.safe_load((tmp_path / "out" / names[0] / "run.yaml").read_text())
    assert (run["noise"], run["learning_rate"]) == ("random:0.25", 0.02)
    assert main(command) == 0
    assert capsys.readouterr().out.count("done before") == 3


def test_no_method_differs_from_itself():
    for name, row in METHODS.items():
        for base in row.bases:
            assert config_class(name, base)(output_dir=".", use_cpu=True, bf16=False).differs_from(row) == []


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("push_to_hub: true", "push_to_hub: each run would replace"),
        ("resume_from_checkpoint: some/checkpoint-3", "resume_from_checkpoint: a stopped comparison resumes"),
        ("overwrite_output_dir: true", "overwrite_output_dir: for a new comparison"),
    ],
)
def test_what_the_file_may_not_say(key, said, tmp_path):
    file = tmp_path / "base.yaml"
    file.write_text(f"{key}\n")
    with pytest.raises(ValueError, match=f"{file}: {said}"):
        planned("--methods", "gappo", *WHERE, "--config", str(file))
    file.write_text(f"{key.partition(':')[0]}: false\noutput_dir: x\n")
    planned("--methods", "gappo", *WHERE, "--config", str(file))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--methods gappo --output_dir x", "--output_dir: name the folder of all runs with --out"),
        ("--methods gappo --push_to_hub", "--push_to_hub: each run would replace"),
        ("--methods gappo --method none", "--method: name the methods with --methods"),
        ("--methods gappo --weight none", "--weight makes another method of one"),
        ("--methods gappo --method amapo", "--method: name the methods with --methods"),
        ("--methods gappo gappo", "--methods has gappo twice"),
        ("--methods gappo:beta=2.0 gappo:beta=2", "has gappo:beta=2.0 and gappo:beta=2, which are the same run"),
        ("--methods gappo amapo --seeds 1 1", "--seeds has 1 twice"),
        ("--methods gappo --seeds 1 --seed 5", "--seed and --seeds: name all of them with --seeds"),
        ("--methods gappo --learning_rates 1e-6 1e-5 --learning-rate 1e-4", "--learning_rate and --learning_rates"),
        ("--methods gappo amapo --base dppo", "unknown base 'dppo'"),
        ("--methods gappo simppo", "unknown method 'simppo'"),
        ("--methods gappo --resume_from_checkpoint true", "resumes when it is started again"),
        ("--methods gappo amapo --gamma_po_steps -1", "method 'gappo': gamma_po_steps"),
        ("--methods gappo --no_such_flag 1", "unknown option '--no_such_flag'"),
        (
            "--methods gappo --metric_for_best_model eval_foo",
            "unknown metric_for_best_model 'eval_foo'; known: eval_lo",
        ),
        ("--methods gappo --out /dev/null/a/b --dry_run", "--out /dev/null/a/b: /dev/null is a file"),
    ],
)
def test_what_is_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        compare.plan([*flags.split(), *WHERE])


def test_an_evaluation_set_is_needed():
    with pytest.raises(ValueError, match="--eval_strategy epoch"):
        compare.plan(["--methods", "gappo", *WHERE[:-2]])
    compare.plan(["--methods", "gappo", *WHERE[:-2], "--eval_strategy", "epoch"])


def test_a_slice_to_evaluate_on_is_kept_in_the_advice(base):
    flags = ["--dataset_train_split", "train[:90%]", "--dataset_test_split", "train[90%:]"]
    data = ["--model_name_or_path", "m", "--dataset_name", base["dataset_name"]]
    with pytest.raises(ValueError, match=r"with --dataset_test_split 'train\[90%:\]' --eval_strategy epoch$"):
        compare.plan(["--methods", "gappo", *data, *flags])


def test_where_to_evaluate_depends_on_the_data(base, tmp_path):
    """What the error advises works."""

    with pytest.raises(ValueError, match=r"name one with --eval_dataset_name$"):  # of one file
        compare.plan(["--methods", "gappo", "--model_name_or_path", "m", "--dataset_name", base["dataset_name"]])
    DatasetDict(train=preference_rows(4), held_out=preference_rows(4)).save_to_disk(tmp_path / "both")
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump({"datasets": [{"path": str(tmp_path / "both")}]}))
    for given in (("--dataset_name", str(tmp_path / "both")), ("--config", str(tmp_path / "mixed.yaml"))):
        with pytest.raises(ValueError, match=", with --") as error:
            compare.plan(["--methods", "gappo", "--model_name_or_path", "m", *given])
        advised = str(error.value).partition(", with ")[2]
        flags = advised.replace("and test_split_size:", "--test_split_size").split()
        comparison, _ = compare.plan(["--methods", "gappo", "--model_name_or_path", "m", *given, *flags])
        script, config, _, mixture = comparison.entries[0].run
        assert all(map(len, train.datasets_of(script, config, mixture)))


def test_errors_have_the_command_s_own_name(capsys):
    with pytest.raises(ValueError, match=r"^method 'gappo': --model_name_or_path is missing"):
        compare.plan(["--methods", "gappo"])
    with pytest.raises(SystemExit):
        compare.plan(["--methods", "gappo", *WHERE, "--max_steps", "x"])
    assert "trl-margins compare: error: argument --max_steps" in capsys.readouterr().err


def test_every_evaluation_has_what_can_choose(compared):
    _, out, _ = compared
    for method in ("dpo", "gappo"):
        assert {f"eval_{name}" for name in MEASURED} <= {*numbers(out, method, 1)}


def test_a_default_of_trl_is_no_warning(recwarn):
    assert main(["compare", "--methods", "gappo", "dpo", *WHERE, "--dry_run"]) == 0
    assert not [each for each in recwarn if "gradient_checkpointing" in str(each.message)]


def test_launchers_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="compare is the work of one process"):
        main(["compare", "--methods", "gappo"])
