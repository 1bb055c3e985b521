"""float32 passes that must not lose digits to TF32, whatever switched it on."""

from __future__ import annotations

import pytest
from processes import start

SWITCHED_BY = {
    "torch's older function": "torch.set_float32_matmul_precision('high')",
    "transformers' tf32=True": "from transformers.utils.import_utils import enable_tf32; enable_tf32(True)",
    "torch's older switch": "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch's newer switch": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "nothing": "pass",
}
CODE = """
import torch
{switch}
from trl_margins.forward.precision import ieee_float32

def value(read):
    try:
        return read()
    except RuntimeError:  # the two sets of switches disagree
        return "unreadable"

def state():
    b = torch.backends
    kinds = (b.cuda.matmul, b.mkldnn.matmul, b.cudnn.conv, b.cudnn.rnn)
    older = (torch.get_float32_matmul_precision, lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32)
    return [kind.fp32_precision for kind in kinds], [value(read) for read in older]

before = state()
for error in (False, True):
    try:
        with ieee_float32():
            assert state()[1] == ["highest", False, False], state()
            assert "tf32" not in state()[0], state()
            if error:
                raise KeyError
    except KeyError:
        pass
    assert state() == before, (before, state())
assert (before[0][0] == "tf32") == {on}, before
"""


@pytest.mark.parametrize("switch", SWITCHED_BY)
def test_off_within_and_back_afterwards(switch: str) -> None:
    """In a process of its own: torch's switches cannot be put back to never having been touched."""
    code = CODE.format(switch=SWITCHED_BY[switch], on=switch != "nothing")
    process = start(exec, code, {})
    process.join()
    assert process.exitcode == 0  # with the error on its standard error
