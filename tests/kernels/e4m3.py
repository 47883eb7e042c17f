"""Triton's interpreter rounds to e4m3 wrongly (carries and NaN are lost, small numbers are cut): here it is mended."""

import numpy as np
import pytest
import torch


def mend_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Conversions from and to e4m3 become torch's, in kernels that run in the interpreter."""
    import triton.language as tl
    from triton.runtime import interpreter

    kinds = {
        tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
        tl.float16: (torch.float16, np.uint16),
        tl.bfloat16: (torch.bfloat16, np.uint16),
        tl.float32: (torch.float32, np.uint32),
    }
    others = interpreter._convert_float

    def convert(bits: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        if tl.float8e4nv not in (source, target):
            return others(bits, source, target, rounding)
        numbers = torch.frombuffer(bytearray(bits.tobytes()), dtype=kinds[source][0])
        rounded = numbers.to(kinds[target][0]).view(torch.uint8).numpy()
        return rounded.view(kinds[target][1]).reshape(bits.shape)

    patch.setattr(interpreter, "_convert_float", convert)
