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
    assert set(shared_model.__dict__) - before <= {"_cache"}, "a test left something in the model"
    shared_model.eval()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
