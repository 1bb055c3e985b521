#!/bin/sh
# Puts in place what benchmarks/gpu_wheels.sh collected, on the machine with the accelerator.
#
#     . benchmarks/gpu_setup.sh DIR...
#
# DIR are the groups that were carried here, in one call or one after the other: the wheels go into $GPU_HOME/site, the
# parts of the bundled model's file into $GPU_HOME/parts. Once all parts are there, with the right checksums, the model
# is converted. Sourced, it also sets PYTHONPATH and TRL_MARGINS_CACHE for the shell. What is done is not done again.
GPU_HOME=${GPU_HOME:-/tmp/trl-margins}
GPU_PYTHON=${GPU_PYTHON:-python3}
export PYTHONPATH="$GPU_HOME/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" TRL_MARGINS_CACHE="$GPU_HOME/models"
export HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1
(
    set -eu
    mkdir -p "$GPU_HOME/site" "$GPU_HOME/parts" "$TRL_MARGINS_CACHE"
    for group in "$@"; do
        for wheel in "$group"/*.whl; do
            [ -e "$wheel" ] && [ ! -e "$GPU_HOME/parts/$(basename "$wheel").done" ] || continue
            "$GPU_PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \
                --no-cache-dir --upgrade --target "$GPU_HOME/site" "$wheel"
            touch "$GPU_HOME/parts/$(basename "$wheel").done"
        done
        for part in "$group"/model.gguf.xz.* "$group"/SHA256SUMS; do
            [ -e "$part" ] && cp -u "$part" "$GPU_HOME/parts/" || true
        done
    done
    model="$TRL_MARGINS_CACHE/smollm2-135m-instruct/0.1.2"
    if [ ! -d "$model" ]; then
        cd "$GPU_HOME/parts"
        if sha256sum --quiet --check SHA256SUMS >/dev/null 2>&1; then
            sort -k2 SHA256SUMS | cut -c67- | xargs cat | xz -dc >model.gguf
            cd "$OLDPWD"
            "$GPU_PYTHON" -c "
import sys
from pathlib import Path
from trl_margins.data.bundled import _convert_into_place
_convert_into_place(Path(sys.argv[1]), Path(sys.argv[2]))" "$GPU_HOME/parts/model.gguf" "$model"
        else
            cd "$OLDPWD"
            echo "the bundled model is not whole yet: $(ls "$GPU_HOME/parts" | grep -c 'model.gguf.xz' || true) part(s)" \
                "of $(wc -l <"$GPU_HOME/parts/SHA256SUMS" 2>/dev/null || echo '?') here"
        fi
    fi
    "$GPU_PYTHON" -c "
from importlib.metadata import version
import torch
card = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA device'
print(card, *(f'{name} {version(name)}' for name in ('torch', 'transformers', 'trl', 'datasets', 'accelerate', 'peft')), sep=', ')"
)
