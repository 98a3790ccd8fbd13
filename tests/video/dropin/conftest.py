import pytest
import torch
from tiny_qwen import build_model


@pytest.fixture(scope="session")
def shared_model():
    return build_model()


@pytest.fixture
def model(shared_model):
    """The tiny model; whatever a test attached must be gone afterwards."""
    before = set(shared_model.__dict__)
    yield shared_model
    left = set(shared_model.__dict__) - before - {"_cache", "_previous_max_cache_length"}  # what generate() keeps
    if "_qts_video_attachment" in left:
        shared_model._qts_video_attachment.remove()  # or every later test fails with this one
    assert not left, f"a test left {left} in the model"
    shared_model.eval()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
