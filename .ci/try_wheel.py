"""Tries what would be published: `python .ci/try_wheel.py dist`, from the repository's root.

Looks into the wheel and the sdist of the folder, installs the wheel with the tested set into a fresh environment, and
runs smoke.py there, from a folder of its own. Everything it makes is gone at the end.
"""

# ruff: noqa: T201 - a script that talks

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# what the tests read, and whoever packages or changes the project needs
IN_THE_SDIST = ("trl_margins", "tests", "recipes", "examples", "docs", "benchmarks", ".ci", ".github")
START = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", flush=True)


def the_only(folder: Path, pattern: str) -> Path:
    """The one file of that kind.

    Raises:
        SystemExit: none, or several.
    """
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder}/{pattern}: {len(found)} files instead of one: {[path.name for path in found]}")
    return found[0]


def source_files(root: Path, folders: tuple[str, ...] = IN_THE_SDIST) -> set[str]:
    """Files below those folders that a distribution should have, as paths relative to the root."""
    return {
        path.relative_to(root).as_posix()
        for folder in folders
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def check_wheel(wheel: Path, root: Path) -> int:
    """Number of files; the package's own and the recipes are all there, and nothing besides them.

    Raises:
        SystemExit: files that are missing, or not the package's.
    """
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    recipes = {f"trl_margins/{name}" for name in source_files(root, ("recipes",)) if name.endswith(".yaml")}
    source = source_files(root, ("trl_margins",)) | recipes
    if ours != source:
        sys.exit(f"{wheel.name}: missing {sorted(source - ours)}, not in the source {sorted(ours - source)}")
    return len(names)


def check_sdist(sdist: Path, root: Path) -> int:
    """Number of files; those of IN_THE_SDIST are all there.

    Raises:
        SystemExit: files that are missing.
    """
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    if missing := source_files(root) - names:
        sys.exit(f"{sdist.name} lacks {sorted(missing)}: see the sdist in pyproject.toml")
    return len(names)


def relative_links(description: str) -> list[str]:
    """Links and pictures that lead nowhere on a package index."""
    targets = re.findall(r'(?:\]\(|src="|srcset="|href=")([^)"\s]+)', description)
    return [target for target in targets if not target.startswith(("https://", "#"))]


def check_description(wheel: Path) -> int:
    """Number of characters of what a package index shows; its links and pictures are absolute.

    Raises:
        SystemExit: relative links, or no description.
    """
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    description = message_from_bytes(archive.read(name)).get_payload(decode=True).decode()
    if not description or (found := relative_links(description)):
        sys.exit(f"{wheel.name}: " + (f"relative links {found}" if description else "no description"))
    return len(description)


def try_wheel(wheel: Path, scratch: Path) -> None:
    """Installs it into a fresh environment and runs the smoke test there.

    Raises:
        CalledProcessError: any of it fails.
    """
    environment, elsewhere = scratch / "environment", scratch / "elsewhere"
    elsewhere.mkdir()
    # nothing of the caller's Python, no network for the models' hub, no cache that stays
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(scratch / "hub")}
    clean |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    say("making a fresh environment ...")
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    constrained = ["install", "--constraint", str(ROOT / "constraints.txt")]
    say("installing torch ...")
    subprocess.run([*pip, *constrained, "torch"], check=True, env=clean)  # first, as the Makefile does
    say(f"installing {wheel.name} ...")
    subprocess.run([*pip, *constrained, str(wheel)], check=True, env=clean)
    subprocess.run([*pip, "check"], check=True, env=clean)
    say("trying it ...")
    smoke = [str(python), "-I", str(ROOT / ".ci" / "smoke.py"), wheel.name.split("-")[1]]
    subprocess.run(smoke, check=True, cwd=elsewhere, env=clean)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    wheel, sdist = the_only(folder, "*.whl"), the_only(folder, "*.tar.gz")
    say(f"{wheel.name}: {check_wheel(wheel, ROOT)} files, {wheel.stat().st_size / 1024:.0f} KiB")
    say(f"its description: {check_description(wheel)} characters")
    say(f"{sdist.name}: {check_sdist(sdist, ROOT)} files, {sdist.stat().st_size / 1024:.0f} KiB")
    with tempfile.TemporaryDirectory(prefix="trl-margins-") as scratch:
        try:
            try_wheel(wheel, Path(scratch))
        except subprocess.CalledProcessError as failed:
            sys.exit(
                f"{wheel.name} did not pass: {' '.join(map(str, failed.cmd[:4]))} … ended with {failed.returncode}"
            )
    say(f"{wheel.name} installs and works")


if __name__ == "__main__":
    main()
