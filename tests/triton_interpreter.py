"""Triton's interpreter as the tests need it."""


def correct_interpreter():
    """Three faults of Triton 3.6's interpreter; the kernels are not to work around them."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    convert = interpreter._convert_float
    dot = interpreter.InterpreterBuilder.create_dot

    # It calls int() on arrays of one element where a loop's bound is a kernel argument; numpy 2.4 refuses that.
    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    # It truncates fp32 to bf16, where the cards round to nearest.
    def patched_convert(x, source, target, rounding):
        if source.is_fp32() and target.is_bf16():
            rounded = torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if source.is_bf16() and target.is_fp32():
            return x.astype(np.uint32) << 16
        return convert(x, source, target, rounding)

    # It keeps bf16 as uint16 and multiplies those integers.
    def patched_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.is_bf16() else x for x in (a, b))
        return dot(self, a, b, *rest)

    interpreter._patch_lang_tensor = patched_tensor
    interpreter._convert_float = patched_convert
    interpreter.InterpreterBuilder.create_dot = patched_dot
