import pytest
import torch
from families import FAMILIES
from tiny_qwen import build_model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Every family in turn."""
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def built(family):
    return family.build_model()


@pytest.fixture(scope="session")
def shared_model():
    return build_model()


@pytest.fixture
def model(request):
    """The tiny Qwen2.5-VL, or that of the test's ``family``; whatever a test attached must be gone afterwards."""
    model = request.getfixturevalue("built" if "family" in request.fixturenames else "shared_model")
    before = set(model.__dict__)
    yield model
    left = set(model.__dict__) - before - {"_cache", "_previous_max_cache_length"}  # what generate() keeps
    if "_qts_video_attachment" in left:
        model._qts_video_attachment.remove()  # or every later test fails with this one
    assert not left, f"a test left {left} in the model"
    model.eval()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
