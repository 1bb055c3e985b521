#!/usr/bin/env bash
# Puts in place what benchmarks/gpu_wheels.sh collected, on the machine with the accelerator.
#
#     . benchmarks/gpu_setup.sh DIR...      # in bash
#
# DIR are the groups that were carried here, in one call or one after the other: the wheels go into $GPU_HOME/site, the
# parts of the bundled model's file into $GPU_HOME/parts. Once all parts are there, with the right checksums, the model
# is converted. Sourced, it also sets PYTHONPATH and HF_ASSETS_CACHE: not in a pipe (`. gpu_setup.sh DIR | tail`), whose
# parts run in shells of their own, so that what they set is lost. What is done is not done again.
GPU_HOME=${GPU_HOME:-/tmp/trl-margins}
GPU_PYTHON=${GPU_PYTHON:-python3}
export PYTHONPATH="$GPU_HOME/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_ASSETS_CACHE="$GPU_HOME/models"
export HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1
(
    set -eu
    mkdir -p "$GPU_HOME/site" "$GPU_HOME/parts" "$HF_ASSETS_CACHE"
    new=
    for group in "$@"; do
        for wheel in "$group"/*.whl; do
            [ -e "$wheel" ] && [ ! -e "$GPU_HOME/parts/$(basename "$wheel")" ] && new="$new $wheel" || true
        done
        for part in "$group"/model.gguf.xz.* "$group"/SHA256SUMS; do
            [ -e "$part" ] && cp -u "$part" "$GPU_HOME/parts/" || true
        done
    done
    if [ -n "$new" ]; then
        "$GPU_PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
            --upgrade --target "$GPU_HOME/site" $new
        for wheel in $new; do touch "$GPU_HOME/parts/$(basename "$wheel")"; done
    fi
    "$GPU_PYTHON" - "$GPU_HOME/parts" "$HF_ASSETS_CACHE/trl-margins/models/smollm2-135m-instruct/0.1.2" <<'PY'
import hashlib, lzma, sys
from pathlib import Path

parts, model = map(Path, sys.argv[1:])
sums = parts / "SHA256SUMS"
if sums.exists() and not model.is_dir():
    names = [line.split() for line in sums.read_text().splitlines()]
    missing = [name for _, name in names if not (parts / name).exists()]
    if missing:
        sys.exit(print("not here yet:", *missing))
    for digest, name in names:
        if hashlib.sha256((parts / name).read_bytes()).hexdigest() != digest:
            sys.exit(f"{name} is damaged: its checksum is not that of SHA256SUMS")
    packed = b"".join((parts / name).read_bytes() for _, name in sorted(names, key=lambda pair: pair[1]))
    (parts / "model.gguf").write_bytes(lzma.decompress(packed))
    from trl_margins.data.bundled import _convert_into_place

    _convert_into_place(parts / "model.gguf", model)
    print("the bundled model is in", model)
PY
    "$GPU_PYTHON" -c "
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
import torch
def said(name):
    try:
        return f'{name} {version(name)}'
    except PackageNotFoundError:  # it comes with another group
        return f'no {name} yet'
card = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA device'
names = 'torch', 'transformers', 'trl', 'datasets', 'pyarrow', 'accelerate', 'peft'
package = find_spec('trl_margins')
print(card, *map(said, names), package.origin if package else 'no trl_margins', sep=', ')"
)
