"""The command line with a DeepSpeed that compiles nothing: on CPUs it would first make an all-reduce in shared memory
of its own, which takes minutes and a compiler.
"""

from __future__ import annotations

import sys

from trl_margins.cli import main


def without_compiler() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    without_compiler()
    main(sys.argv[1:])
