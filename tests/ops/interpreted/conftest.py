"""These files run in a process of their own, with TRITON_INTERPRET=1 set before Triton is imported; the test that
starts it is tests/ops/test_triton_interpret.py."""

import os

from triton_interpreter import correct_interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    correct_interpreter()
