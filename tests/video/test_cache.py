"""VideoCache by itself: what is found, what is dropped, how much it holds."""

import copy

import pytest
import torch
from qts_video.cache import VideoCache, content_key
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


def key(name):
    return content_key({"name": name}, [], ())


def filled(size, **options):
    """A tensor of ``size`` bytes."""
    return torch.arange(size // 4, dtype=torch.int32, **options)


def test_what_was_used_least_recently_goes_first():
    cache = VideoCache(max_bytes=300)
    for name in "abc":
        cache.put(key(name), filled(100), None)
    assert cache.nbytes == 300
    assert cache.get(key("a"), vision=False) is not None
    cache.put(key("d"), filled(100), None)
    assert [cache.get(key(name), vision=False) is not None for name in "abcd"] == [True, False, True, True]
    cache.put(key("e"), filled(200), None)  # a and c were used before d
    assert [cache.get(key(name), vision=False) is not None for name in "acde"] == [False, False, True, True]
    assert (len(cache), cache.nbytes, cache.hits, cache.misses) == (2, 300, 6, 3)


def test_an_entry_larger_than_the_cache_is_not_kept_and_drops_nothing():
    cache = VideoCache(max_bytes=300)
    cache.put(key("a"), filled(200), None)
    cache.put(key("b"), filled(304), None)
    assert cache.get(key("a"), vision=False) is not None
    assert cache.get(key("b"), vision=False) is None
    cache.put(key("a"), filled(304), None)  # nor is what it would have replaced
    assert len(cache) == cache.nbytes == 0


def test_an_entry_takes_the_place_of_the_one_with_its_key():
    cache = VideoCache()
    cache.put(key("a"), filled(100), None)
    assert cache.get(key("a"), vision=True) is None
    cache.put(key("a"), filled(100), filled(40))
    assert (len(cache), cache.nbytes) == (1, 140)
    assert torch.equal(cache.get(key("a"), vision=True).vision, filled(40))
    assert torch.equal(cache.get(key("a"), vision=False).output, filled(100))
    cache.clear()
    assert (len(cache), cache.nbytes, cache.hits, cache.misses) == (0, 0, 2, 1)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_outputs_of_any_type_come_back_in_containers_of_their_own(device):
    whole, features = torch.randn(5, 3, dtype=torch.bfloat16), torch.randn(5, 2)
    outputs = [
        whole,
        (whole.split([2, 3]), [features]),
        BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=whole.split([2, 3])),
    ]
    cache = VideoCache(device=device)
    for number, output in enumerate(outputs):
        cache.put(key(number), output, features)
    for _ in range(2):
        tensor, (parts, layers), model_output = (cache.get(key(n), vision=True).output for n in range(3))
        assert torch.equal(tensor, whole)
        assert isinstance(parts, tuple)
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(layers[0], features)
        assert isinstance(model_output, BaseModelOutputWithPooling)
        assert torch.equal(torch.cat(tuple(model_output.pooler_output)), whole)
        assert torch.equal(model_output.last_hidden_state, features)
        layers.append(None)  # as generate() changes what it is given
        model_output.pooler_output = None


def test_memory_is_counted_once_and_hidden_states_of_layers_are_not_kept():
    features = torch.randn(10, 4)
    layers = tuple(torch.randn(10, 4) for _ in range(3))
    output = BaseModelOutputWithPooling(
        last_hidden_state=features, pooler_output=features.split([4, 6]), hidden_states=layers, attentions=layers
    )
    cache = VideoCache()
    cache.put(key("a"), output, features)
    assert cache.nbytes == 10 * 4 * 4
    found = cache.get(key("a"), vision=True).output
    assert found.hidden_states is found.attentions is None
    assert output.hidden_states is layers


def test_a_key_tells_contents_apart():
    pixels = torch.arange(12, dtype=torch.float32).view(3, 4)
    weight = torch.ones(2)
    base = {"pixels": pixels, "grid": torch.tensor([[1, 2, 6]]), "layer": -1}

    def made(weights=(weight,), state=(False, "sdpa"), **changes):
        return content_key(base | changes, weights, state)

    keys = [
        made(),
        made(pixels=pixels + 1),
        made(pixels=pixels.view(4, 3)),
        made(pixels=pixels.view(torch.int32)),
        made(pixels=pixels.to(torch.bfloat16)),
        made(grid=torch.tensor([[2, 1, 6]])),
        made(grid=[[1, 2, 6]]),
        made(layer=-2),
        made(layer=[-2, -1]),
        made(layer=[[-2], -1]),
        made(layer=[-2, [-1]]),
        made(other=None),
        made(weights=(torch.ones(2),)),
        made(state=(True, "sdpa")),
        made(state=(False, "eager")),
    ]
    assert len(set(keys)) == len(keys)
    assert made(pixels=pixels.clone().t().contiguous().t()) == keys[0]
    weight.add_(1)
    assert made() != keys[0]


def test_an_argument_that_cannot_be_looked_up_raises():
    with pytest.raises(TypeError, match="whose cache is a object: leave it out"):
        content_key({"cache": object()}, [], ())


def test_a_cache_belongs_to_the_model_it_was_first_given_to():
    cache, model = VideoCache(), nn.Linear(1, 1)
    cache.bind(model)
    cache.bind(model)
    with pytest.raises(ValueError, match="belongs to another model"):
        cache.bind(nn.Linear(1, 1))
    del model
    with pytest.raises(ValueError, match="belongs to another model"):
        cache.bind(nn.Linear(1, 1))


def test_a_copy_is_empty_and_takes_a_model_of_its_own():
    cache, model = VideoCache(max_bytes=77, device="cpu"), nn.Linear(1, 1)
    cache.bind(model)
    cache.put(key("a"), filled(40), None)
    twin = copy.deepcopy(cache)
    assert (len(twin), twin.max_bytes, twin.device, len(cache)) == (0, 77, torch.device("cpu"), 1)
    twin.bind(copy.deepcopy(model))


def test_a_cache_says_what_it_holds():
    cache = VideoCache()
    cache.put(key("a"), filled(4000), None)
    cache.get(key("a"), vision=False)
    assert repr(cache) == "<VideoCache: 1 entries, 4,000 bytes, 1 hits, 0 misses>"


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_room_must_be_positive(max_bytes):
    with pytest.raises(ValueError, match=f"max_bytes must be positive, got {max_bytes}"):
        VideoCache(max_bytes)
