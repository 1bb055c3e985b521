"""What is pushed to the Hub: the model, its card and the run's settings, but no numbers of pairs and no secret."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi

from ..probes.diagnostics import ANCHORS_FILE
from ..recording.pair_log import PAIRS_FILE
from ..redaction import redacted
from .folder import replace_links

if TYPE_CHECKING:
    from trl.trainer.base_trainer import _BaseTrainer as TRLTrainer

    from .configs import MarginOptions
else:
    TRLTrainer = object

# The logs of pairs, also those that an earlier run left (`pair_log-before-9.csv`), in the folder and below it
OF_PAIRS = tuple(
    f"{where}{PurePath(file).stem}{end}"
    for file in (PAIRS_FILE, ANCHORS_FILE)
    for where in ("", "*/")
    for end in (".csv", "-*.csv", ".tmp")
)


class PushMixin(TRLTrainer):
    """Leaves logs of pairs out of what is uploaded, unless `push_pair_log` is set, and secrets out of
    `training_args.bin`, which is uploaded with a model.
    """

    options: MarginOptions

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """transformers'; where it fails, before training, the error says what to do."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:
            raise ConnectionError(
                f"push_to_hub: the repository {self.args.hub_model_id or self.args.output_dir} cannot be made or "
                f"reached: {error}. Log in with `hf auth login`, connect to the network, or train without push_to_hub "
                "and upload the folder afterwards with `hf upload`"
            ) from error

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, without the logs of pairs."""
        with uploads_without(() if self.options.push_pair_log else OF_PAIRS):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        replace_links(Path(str(self.args.output_dir)))
        with uploads_without(() if self.options.push_pair_log else OF_PAIRS), saves_no_secret(self.args):
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with saves_no_secret(self.args):
            super()._save(*args, **kwargs)


@contextmanager
def uploads_without(files: Sequence[str]) -> Iterator[None]:
    """Folders are uploaded without these files. transformers' `push_to_hub` takes no patterns of its own."""
    upload = HfApi.upload_folder

    def upload_some(self: HfApi, **given: Any) -> Any:
        given["ignore_patterns"] = [*(given.get("ignore_patterns") or ()), *files]
        try:
            return upload(self, **given)
        except Exception as error:
            folder = given.get("folder_path")
            raise ConnectionError(
                f"the upload of {folder} failed: {error}. Nothing is lost: upload it again with `hf upload "
                f"{given.get('repo_id')} {folder}`"
            ) from error

    HfApi.upload_folder = upload_some  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        HfApi.upload_folder = upload  # type: ignore[method-assign]


@contextmanager
def saves_no_secret(config: Any) -> Iterator[None]:
    """`torch.save` writes a copy of this config that has no secret. The config itself is left as it is: other
    processes and pushes need what it holds.
    """
    save = torch.save

    def save_redacted(of: Any, *args: Any, **kwargs: Any) -> None:
        if of is config:
            of = copy.copy(config)
            vars(of).update(redacted(vars(config)))
        save(of, *args, **kwargs)

    torch.save = save_redacted  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.save = save
