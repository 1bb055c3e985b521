"""No secret in anything that is written or printed, whichever option carried it."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import drawn_pictures, preference_rows
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from trl import DPOConfig

from trl_margins import GapPOConfig, GapPOTrainer, MarginDPOConfig, MarginDPOTrainer, cli
from trl_margins.checks import options_of
from trl_margins.redaction import redacted, redacted_command, redacted_text
from trl_margins.report import figures
from trl_margins.trainers import card
from trl_margins.trainers.pushing import saves_no_secret

CANARY = "hf_" + "CaNaRy".ljust(34, "x")
PLAIN = "s3cr3t-of-no-known-form"
OPTIONS = {
    "hub_token": PLAIN,
    "model_init_kwargs": {"token": CANARY, "dtype": "float32"},
}


def bytes_of(file: Path) -> bytes:
    """A file's, archives unpacked."""
    found = file.read_bytes()
    if zipfile.is_zipfile(file):
        archive = zipfile.ZipFile(file)
        found += b"".join(archive.read(name) for name in archive.namelist())
    return found


def bytes_below(folder: Path) -> dict[Path, bytes]:
    return {file: bytes_of(file) for file in folder.rglob("*") if file.is_file()}


def assert_no_secret(folder: Path, printed: str = "") -> None:
    files = bytes_below(folder)
    assert files
    for secret in (CANARY, PLAIN):
        assert secret not in printed
        assert not [file for file, content in files.items() if secret.encode() in content]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("inputs")
    pairs = folder / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, preference_rows(12))))
    return tiny_model, pairs


@pytest.fixture
def one_picture(monkeypatch):
    """In cards and reports: the others have the same texts."""
    monkeypatch.setattr(card, "pictures", drawn_pictures)
    monkeypatch.setattr(figures, "PICTURES", (figures.loss,))


def flags(inputs, out, **more) -> list[str]:
    given = {
        **OPTIONS,
        "model_name_or_path": inputs[0],
        "dataset_name": inputs[1],
        "output_dir": out,
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_length": 128,
        "eval_strategy": "no",
        "report_to": "none",
        **more,
    }
    texts = {name: json.dumps(v) if isinstance(v, dict) else str(v) for name, v in given.items() if v is not None}
    return [text for pair in ((f"--{name}", value) for name, value in texts.items()) for text in pair]


@pytest.mark.parametrize("spelled", ["flags", "yaml"])
def test_train_and_resume_write_and_print_none(inputs, tmp_path, spelled, capfd, caplog, monkeypatch, one_picture):
    arguments = flags(inputs, tmp_path / "out")
    if spelled == "yaml":
        import yaml

        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**OPTIONS, "env": {"MY_API_KEY": PLAIN}}))
        names = {f"--{name}" for name in OPTIONS}
        kept = [a for i in range(0, len(arguments), 2) if arguments[i] not in names for a in arguments[i : i + 2]]
        arguments = ["--config", str(tmp_path / "mine.yaml"), *kept]
        monkeypatch.delenv("MY_API_KEY", raising=False)
    assert cli.main(["train", *arguments]) == 0
    assert cli.main(["train", *arguments, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr()
    assert_no_secret(tmp_path / "out", printed.out + printed.err + caplog.text)


@pytest.mark.rehearsal
def test_dry_run_and_compare_write_and_print_none(inputs, tmp_path, capfd, caplog, one_picture):
    assert cli.main(["train", *flags(inputs, tmp_path / "out"), "--dry_run"]) == 0
    shared = flags(inputs, tmp_path / "out", output_dir=None, eval_dataset_name=inputs[1], eval_strategy="steps")
    shared += ["--dataset_test_split", "train"]
    for _ in range(2):  # the second time nothing is left to do
        assert cli.main(["compare", "--methods", "simpo", "gappo", "--out", str(tmp_path / "out"), *shared]) == 0
    printed = capfd.readouterr()
    assert_no_secret(tmp_path / "out", printed.out + printed.err + caplog.text)


def test_from_python(inputs, tmp_path, capfd, one_picture):
    config = GapPOConfig(
        str(tmp_path), hub_token=PLAIN, model_init_kwargs={"token": CANARY}, bf16=False, max_steps=1, report_to="none"
    )
    trainer = GapPOTrainer(inputs[0], config, train_dataset=Dataset.from_list(preference_rows(8)))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert trainer.args.hub_token == PLAIN  # what pushes still has it
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (loaded.hub_token, loaded.model_init_kwargs["token"]) == (None, None)
    assert loaded.learning_rate == config.learning_rate
    printed = capfd.readouterr()
    assert_no_secret(tmp_path, printed.out + printed.err)


def test_trls_own_config(inputs, tmp_path):
    kwargs = {"token": CANARY}
    config = DPOConfig(
        str(tmp_path), model_init_kwargs=kwargs, hub_token=PLAIN, bf16=False, report_to="none", max_steps=1
    )
    trainer = MarginDPOTrainer(inputs[0], args=config, train_dataset=Dataset.from_list(preference_rows(8)))
    trainer.train()
    trainer.save_model()
    assert CANARY not in json.dumps(trainer.settings)
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).learning_rate == config.learning_rate
    assert (config.hub_token, config.model_init_kwargs["token"]) == (PLAIN, CANARY)
    assert_no_secret(tmp_path)


def test_copies_in_the_process_keep_them(tmp_path):
    config = MarginDPOConfig(str(tmp_path), hub_token=PLAIN, model_init_kwargs={"token": CANARY}, bf16=False)
    for other in (copy.copy(config), copy.deepcopy(config)):
        assert (other.hub_token, other.model_init_kwargs) == (PLAIN, {"token": CANARY})
        assert vars(other).keys() == vars(config).keys()
    deep = copy.deepcopy(config)
    deep.model_init_kwargs["token"] = "another"
    assert config.model_init_kwargs["token"] == CANARY
    other = pickle.loads(pickle.dumps(config))  # as `torch.multiprocessing.spawn` and Ray pass it on
    assert (other.hub_token, other.model_init_kwargs) == (PLAIN, {"token": CANARY})
    assert vars(other).keys() == vars(config).keys()


def test_trackers_are_sent_none(inputs, tmp_path, monkeypatch):
    """What they are sent, and a real event file."""
    (config,) = configs_with_secrets(tmp_path / "out", report_to="tensorboard", max_steps=1)
    for sent in (config.to_dict(), config.to_sanitized_dict(), config.to_json_string()):
        assert PLAIN not in str(sent)
        assert CANARY not in str(sent)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    GapPOTrainer(inputs[0], config, train_dataset=Dataset.from_list(preference_rows(8))).train()
    (events,) = (tmp_path / "events").rglob("events.*")
    assert b"learning_rate" in events.read_bytes()
    assert_no_secret(tmp_path)


def configs_with_secrets(out: Path, **more) -> list:
    given = {"hub_token": PLAIN, "model_init_kwargs": {"token": CANARY}, "bf16": False, "run_name": f"for {CANARY}"}
    return [GapPOConfig(str(out), **{**given, **more})]


TEXTS = [name for name, takes in options_of(GapPOConfig).items() if str in takes.kinds]


def test_every_option_with_text(tmp_path):
    """A token in any of them is in nothing that is written or sent, nor is it in an error."""
    config = GapPOConfig(str(tmp_path), bf16=False)
    for name in TEXTS:
        vars(config)[name] = f"a {CANARY} b"
    for name in ("model_init_kwargs", "lr_scheduler_kwargs", "accelerator_config", "fsdp_config", "deepspeed"):
        vars(config)[name] = {"x": [{"api_key": PLAIN, "secret": ["a", PLAIN]}, f"https://me:{PLAIN}/x@host"]}
    assert len(TEXTS) > 30
    for sent in (config.to_dict(), config.to_json_string()):
        assert CANARY not in str(sent)
        assert PLAIN not in str(sent)
    file = tmp_path / "training_args.bin"
    with saves_no_secret(config):
        torch.save(config, file)
    assert_no_secret(tmp_path)
    assert config.run_name == f"a {CANARY} b"


@pytest.mark.parametrize("command", ["train", "evaluate", "inspect", "report", "select", "score", "hessian", "pairs"])
def test_no_command_repeats_one(command, inputs, tmp_path, capfd):
    """Nor do the errors about options that are unknown, or have a wrong value."""
    address = f"https://me:{PLAIN}@example.invalid/pairs.jsonl"
    for arguments in (
        [address],
        ["--dataset_name", address, "--model_name_or_path", address],
        ["--dataset_name", str(inputs[1]), "--model_name_or_path", CANARY, "--output_dir", str(tmp_path / "out")],
        ["--hub_tokn", PLAIN, "--hub_token", PLAIN],
        ["--seed", CANARY],
        [f"--nosuch={CANARY}"],
    ):
        with pytest.raises(SystemExit) if arguments[0] == "--seed" else suppress(Exception, SystemExit):
            console_main([command, *arguments])
        printed = capfd.readouterr()
        assert PLAIN not in printed.out + printed.err
        assert CANARY not in printed.out + printed.err


def test_nor_does_a_traceback(monkeypatch, capfd):
    monkeypatch.setattr("trl_margins.cli.recipes._read", lambda name, path: int(f"hub_token={PLAIN}"))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(ValueError, match="invalid literal") as caught:
        console_main(["recipes"])
    sys.excepthook(caught.type, caught.value, caught.tb)
    printed = capfd.readouterr().err
    assert "Traceback" in printed
    assert "hub_token=…" in printed
    assert PLAIN not in printed


def console_main(argv: list[str]) -> int:
    """As on the console, where errors are printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trl-margins", *argv])
        status = cli.main()
        if status:
            raise SystemExit(status)
        return status


def test_evaluation_and_report_write_and_print_none(inputs, tmp_path, capfd):
    model = shutil.copytree(inputs[0], tmp_path / CANARY)  # a name that is a secret is shown as one
    shown = ["--model_name_or_path", str(model), "--dataset_name", str(inputs[1]), "--bootstrap", "2"]
    assert cli.main(["evaluate", *shown, "--json", str(tmp_path / "numbers.json")]) == 0
    printed = capfd.readouterr()
    assert CANARY not in printed.out + printed.err


@pytest.mark.parametrize(
    "text",
    [
        f"--hub_token {PLAIN} --bf16 false",
        f"--hub-token='{PLAIN}'",
        f'--model_init_kwargs \'{{"token": "{PLAIN}"}}\'',
        f"{{'use_auth_token': '{PLAIN}'}}",
        f"https://me:{PLAIN}@example.org/x.json",
        f"https://example.org/x.json?split=a&token={PLAIN}",
        f"https://example.org/x?X-Amz-Signature={PLAIN}&b=1",
        f"WANDB_API_KEY: {PLAIN}",
        f"Authorization: Bearer {PLAIN}",
        f"aws_secret_access_key={PLAIN}",
        f"401 for {CANARY}",
        f"hub_token='{PLAIN}, and}} more {PLAIN}' and so on",
        f'"password": "a \\" b {PLAIN}", "x": 1',
        f"Authorization: Basic {PLAIN}==",
        f"{{'Authorization': 'Basic a {PLAIN}'}}",
        f"api_keys: ['a', \"{PLAIN}\"], beta=1",
        f"{{'secret': {{'a': ['{PLAIN}']}}, 'y': 2}}",
        f"password = {PLAIN}, beta = 1",
        f"hf_jwt_{PLAIN}",
        f"hf_oauth_{PLAIN}",
        f"https://user:pa/{PLAIN}@host/x",
        f"https://user:p@{PLAIN}@host/x",
        f"https:/user:{PLAIN}@host/x",
        f"postgresql://:{PLAIN}@host/x",
        f"optim_args betas=0.9,token={PLAIN},eps=1",
        f"--optim_args token={PLAIN}",
        f"https://{PLAIN}@host/x",
        f"clientSecret={PLAIN}",
        f"os.environ['HF_TOKEN'] = '{PLAIN}'",
        f"OPENAI_API_KEY_2={PLAIN}",
        f"password='not closed {PLAIN}",
        f"xoxb-{PLAIN}",
        f"AIza{PLAIN}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{PLAIN}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_what_a_secret_looks_like(text):
    assert PLAIN not in redacted_text(text)
    assert CANARY not in redacted_text(text)


def test_a_value_in_quotes_keeps_its_quotes():
    for quote in ("'", '"', "\\'", '\\"'):
        assert redacted_text(f"a hub_token={quote}{PLAIN} x{quote}, b") == f"a hub_token={quote}…{quote}, b"


def test_a_value_of_another_type_is_not_shown():
    with pytest.raises(ValueError, match=r"hub_token must be text; it is a dict$"):
        options_of(GapPOConfig)["hub_token"].read({"key": PLAIN})


@pytest.mark.parametrize("key", ["hub_token", " token", "API-key ", "\tmyPassword\n", "secret\n\n"])
def test_the_name_of_a_secret_whatever_is_around_it(key):
    assert redacted({key: PLAIN, key + "_of": "kept"}) == {key: None, key + "_of": "kept"}


TOKENS = {
    **dict.fromkeys(["hf_", "api_org_", "ghp_", "gho_", "sk-"], "a1" * 17),
    **dict.fromkeys(["github_pat_", "glpat-", "sk-proj-", "sk-ant-", "sk-or-", "sk-svcacct-"], "a1_b2-" * 5),
    **dict.fromkeys(["hf_jwt_", "hf_oauth_", "hf_app_"], "a1.b2/c3+d4~e5-f6_"),
    **dict.fromkeys(["xoxb-", "xoxp-", "AIza", "AKIA", "ASIA"], "a1-b2_" * 3),
    **dict.fromkeys(["Basic ", "Bearer "], "QWxh.ZGRp=="),
    **dict.fromkeys(["?token=", "&X-Amz-Signature=", "?sig=", "#code=", ";auth=", "&key="], "a1b2"),
    "": "eyJhbGciOiJI.eyJzdWIi.c2lnbg",
}


@pytest.mark.parametrize("begins", TOKENS)
def test_all_of_a_known_token_and_no_more(begins):
    text = f"401 for x{begins}" if begins[:1] in {*"?&#;"} else f"401 for {begins}"
    assert redacted_text(f"{text}{TOKENS[begins]}") == f"{text}…"
    assert redacted_text(f"'{text}{TOKENS[begins]}' (not found)") == f"'{text}…' (not found)"


@pytest.mark.parametrize("inside", ["{}", "1, {}, 'a)]}}'", "[1, ({},)], {{'a': 2}}", '"a \\" b", {}'])
@pytest.mark.parametrize(("opens", "closes"), ["[]", "()", "{}"])
def test_what_a_bracket_holds_is_the_secret_and_what_is_behind_it_stays(opens, closes, inside):
    held = f"{opens}{inside.format(repr(PLAIN))}{closes}"
    assert redacted_text(f"x api_keys={held} and beta=1") == "x api_keys=… and beta=1"
    assert redacted_text(f"'api_keys': {held}, 'y': [1]") == "'api_keys': …, 'y': [1]"
    assert redacted_text(f"x api_keys={held[:-1]} and more") == "x api_keys=…"  # not closed


@pytest.mark.parametrize(
    "text",
    [
        "2.8 nats per token: more than before",
        "pad_token: <s>, eos_token=</s>",
        "pad_token: '[PAD]', {\"eos_token\": \"</s>\"}, 3 tokens: 'a b c'",
        "hf_transfer/some-data-of-a-long-name, sk-learn-and-its-friends-abc, git@github.com:me/x, me@example.org",
        "https://example.org/x?page=2#token",
        "tokens=12, token=7 of 9",
        "max_tokens=5 and tokenizer: fast",
        "hub_token=None, hub_token: null, use_auth_token=True",
        "hub_token: log in first",
        "The secret: never give up",
        "hf://org@rev/x, hf://datasets/org/x@rev:1",
        "http://localhost:8080/a/@b, ssh://git@github.com/x",
        "unknown option --hub_token: did you mean --hub_model_id",
        "bearer of news, basic training",
        "C:/Users/me@work/x, file:///home/me/x, /home/me/password/a, the keys 'token' and 'beta'",
    ],
)
def test_what_is_none(text):
    assert redacted_text(text) == text


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--hub_token", f"a {PLAIN}"], "--hub_token '…'"),
        ([f"--hub-token={PLAIN} x", "--beta", "2"], "'--hub-token=…' --beta 2"),
        (["--model_init_kwargs", json.dumps({"token": f"}} {PLAIN}", "a": 1})], '\'{"token": null, "a": 1}\''),
        (["--dataset_name", f"https://me:{PLAIN}/x@host/a"], "'https://…@host/a'"),
        (["--output_dir", "secret: 1", "--run_name", "secret santa"], "'secret santa'"),
    ],
)
def test_a_command_line(argv, shown):
    command = redacted_command(["train", *argv])
    assert PLAIN not in command
    assert command.endswith(shown)


@pytest.mark.parametrize(
    "text", ["-", "_", "a-", "token ", "password:", "https://", "https://a:", "\\", "{[", 'password="\\', "eyJ."]
)
def test_looking_for_them_takes_no_time(text):
    began = time.perf_counter()
    redacted_text(text * (20_000 // len(text)))
    assert time.perf_counter() - began < 2


def test_settings_keep_their_form():
    given = {"hub_token": "x", "token": True, "n": [1, {"password": "y", "eos_token": "</s>"}], "key": ("a", None)}
    assert redacted(given) == {
        "hub_token": None,
        "token": True,
        "n": [1, {"password": None, "eos_token": "</s>"}],
        "key": ("a", None),
    }
    given = {"api_keys": ["x"], "secret": {"a": "x"}, "password": 12, "use_auth_token": False, "passwords": None}
    assert redacted(given) == {**dict.fromkeys(given), "use_auth_token": False}


def test_what_is_uploaded(inputs, tmp_path, monkeypatch, one_picture):
    """Each file of every upload: no numbers of pairs unless asked for, nothing of earlier runs, no lock, no secret."""
    uploaded: list[tuple[Path, list[str]]] = []

    def upload_folder(self, folder_path, ignore_patterns=None, **given):
        folder = Path(folder_path)
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        kept = list(filter_repo_objects(names, ignore_patterns=ignore_patterns))
        uploaded.append((folder, kept))
        for name in kept:
            assert PLAIN.encode() not in bytes_of(folder / name), name
            assert CANARY.encode() not in bytes_of(folder / name), name

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *a, **k: type("Url", (), {"repo_id": "me/x"})())
    monkeypatch.setattr("transformers.trainer.PushInProgress", lambda jobs: None)
    logs = ("pair_log.csv", "pair_log-before-9.csv", "anchor_diagnostics.csv", "anchor_diagnostics-before-9.csv")
    for asked in (False, True):
        out = tmp_path / str(asked)
        strategy = {"hub_strategy": "all_checkpoints", "save_steps": 1, "push_to_hub": True, "hub_always_push": True}
        (config,) = configs_with_secrets(out, max_steps=2, report_to="none", push_pair_log=asked, **strategy)
        trainer = GapPOTrainer(inputs[0], config, train_dataset=Dataset.from_list(preference_rows(8)))
        monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
        trainer.push_in_progress = None
        (out / "_previous-1").mkdir(parents=True)
        for name in (*logs[1:], "_previous-1/pair_log.csv", "_run.lock", "_previous-1/model.safetensors"):
            (out / name).write_text("1")
        trainer.train()
        trainer.push_to_hub()
        whole = [set(names) for folder, names in uploaded if folder == out]
        of_checkpoints = [names for folder, names in uploaded if folder != out]
        assert len(whole) >= 2
        assert len(of_checkpoints) >= 2
        for names in whole:
            assert names - {"model.safetensors", "README.md", "generation_config.json", "trainer_state.json"} == {
                *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
                *("training_args.bin", "margin_run.json"),
                *(names & {f"figures/{file.name}" for file in (out / "figures").glob("*")}),
                *(logs if asked else ()),
            } - ({"pair_log.csv"} - names)  # before the first log
        assert ("pair_log.csv" in whole[-1]) is asked
        assert not [name for names in of_checkpoints for name in names if "pair_log" in name]
        uploaded.clear()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hub_token='a', b", "hub_token='…', b"),
        ('"api_key": "a", "b": 1', '"api_key": "…", "b": 1'),
        ("password=Bearer ", "password=…"),  # a scheme alone is the value
        ("Authorization: Basic abc def\nnext: 1", "Authorization: Basic …\nnext: 1"),
        ("Authorization: Token a 'quoted'", "Authorization: Token …'quoted'"),
        ("secret: abc1 and more", "secret: … and more"),  # a digit: no prose
        ("secret: never give up the secret: no way", "secret: never give up the secret: no way"),
        ("secret = never give up", "secret = … give up"),
        ("secret => abc, b = 2", "secret => …, b = 2"),
        ("'secret': abc def", "'secret': … def"),
        ("{secret: abc}", "{secret: …}"),
        ("token='a b' token: 'c' token: d", "token='…' token: '…' token: d"),
        ("'token': abc", "'token': …"),
        ("token=abc token=7x token=7 token=", "token=… token=… token=7 token="),
        ("a,token=abc token=7", "a,token=… token=7"),
        ("a --hub_token b --hub_token --c d", "a --hub_token … --hub_token --c d"),
        ("the hub_token b", "the hub_token b"),
        ("password='a\\\\' b='c'", "password='…' b='c'"),
        ("password='a\\' b='c'", "password='…'c'"),
        ("password=(a, 'b)', [c)]) d", "password=… d"),
        ("password=[a) b", "password=…"),
        ("password=hf_" + "a" * 30, "password=…"),
    ],
)
def test_where_a_value_ends(text, shown):
    assert redacted_text(text) == shown


class Settings(NamedTuple):
    name: str
    n: int


def test_kinds_of_settings_stay_what_they_are():
    """What holds no secret is the same object."""
    secret = f"--hub_token {PLAIN}"
    for given in ("a", 1, None, ["a", 1], ("a",), {"a"}, frozenset("a"), Settings("a", 1)):
        assert redacted(given) is given
    assert redacted({"password": True, f"token={PLAIN}": 1, 2: secret}) == {
        "password": True,
        "token=…": 1,
        2: "--hub_token …",
    }
    for kind in (list, tuple, set, frozenset):
        found = redacted(kind([secret]))
        assert (type(found), [*found]) == (kind, ["--hub_token …"])
    assert redacted(Settings(secret, 1)) == Settings("--hub_token …", 1)
    assert type(redacted(Settings(secret, 1))) is Settings
    for blanks in (0, 250):  # a long text is looked at each time
        assert redacted(secret + " " * blanks) == "--hub_token …" + " " * blanks
    assert redacted_command(["[1", '{"a": 1}', ' {"token": "x"}', "--a"]) == (
        """'[1' '{"a": 1}' '{"token": null}' --a"""
    )
    assert redacted_command(["--hub_token", "a", "b", "--hub_token=", "--c", "d"]) == (
        "--hub_token '…' '…' --hub_token= --c d"
    )
