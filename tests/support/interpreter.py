"""Where there is no GPU, Triton kernels run in its interpreter on CPU tensors, and as hardware would.

Importing this module sets TRITON_INTERPRET=1, so it must come before anything that imports triton.
"""

import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import torch

os.environ["TRITON_INTERPRET"] = "1"

from triton import language as tl
from triton.runtime import interpreter


def make_faithful() -> None:
    """Switch on the sanitizer, and compute the operations that the interpreter gets wrong."""
    builder = type(interpreter.interpreter_builder)
    # device_assert, and an error wherever an int32 overflows.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, debug=True
    )
    plain_cast = builder.cast_impl

    def fused_multiply_add(self, x, y, z):
        # One rounding, as the instruction has. A product of two fp32 is exact in fp64.
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(wide.astype(np.float32), z.dtype.scalar)

    def cast(self, source, target_type):
        # The interpreter truncates fp32 to bf16; hardware rounds to the nearest, ties to even.
        types = (source.dtype.scalar, target_type.scalar)
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), target_type.scalar)
        if types == (tl.bfloat16, tl.float32):
            wide = (source.data.astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(wide, target_type.scalar)
        return plain_cast(self, source, target_type)

    builder.create_fma = fused_multiply_add
    builder.cast_impl = cast
    # Hardware's maximum of a number and NaN is the number.
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)


def make_quick() -> None:
    """Leave out what the interpreter does again at every call; without this it takes half as long again."""
    plain_patch = interpreter._patch_lang
    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_once(function):
        # A launch puts the interpreter's operations into triton.language, and takes them out at its end;
        # each device function that it calls would put them there again.
        is_there = not tl.core.is_builtin(tl.load)
        return interpreter._LangPatchScope() if is_there else plain_patch(language)

    interpreter._patch_lang = patch_once
