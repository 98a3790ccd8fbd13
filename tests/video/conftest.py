"""What is loaded without naming a device goes to the GPU where there is one. These tests compare with the CPU bit for
bit, so that they are the same everywhere they see none: but those marked ``gpu``."""

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if item.get_closest_marker("gpu"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that a test starts
        return (yield)
