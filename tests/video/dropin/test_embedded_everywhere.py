"""The model that the package carries answers on every version of transformers, whose text positions differ."""

from qts_video import embedded
from qts_video.miniworld.evaluate import ALL_TOKENS, accuracy, ask, films


def test_answers():
    model, processor, selector = embedded.load()
    selector.retention_ratio = 0.1
    found = accuracy(
        list(ask(model, processor, films("validation", 1100, 4, (20, 30)), {"all": ALL_TOKENS, "qtsplus": selector}))
    )
    assert found["all"]["questions"] >= 16
    assert found["all"]["all"] > 0.9
    assert found["qtsplus"]["all"] > 0.8
