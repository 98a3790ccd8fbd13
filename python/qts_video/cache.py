"""Ask many questions about one video, encode it once: a cache of what the vision tower and its projector gave."""

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

_SCALARS = (bool, int, float, str, torch.dtype, torch.device)
# Large, and read by no model behind its video encoder.
_NOT_KEPT = ("hidden_states", "attentions")


@dataclass(frozen=True)
class Encoded:
    """One call of a model's video encoder."""

    output: Any
    """What it returned, of whatever type, without the hidden states and attentions of single layers."""
    vision: torch.Tensor | None
    """What went into the projector; None where nobody asked for it."""


@dataclass(frozen=True)
class _Stored:
    """A tensor of an entry, and the device it came from."""

    tensor: torch.Tensor
    device: torch.device


class VideoCache:
    """Features of videos by their content, for ``attach(..., cache=VideoCache())``. Belongs to one model.

    A call of the model's video encoder is looked up by a BLAKE2b hash of its pixel values (bytes, shape, dtype), its
    grid and its other arguments, and by the version of the encoder's weights; where it is found, neither the vision
    tower nor the projector run, and what they gave is returned bit for bit. An entry is a call: the videos of a batch
    are found together or not at all, since encoding them one by one would not give the same bits.

    Hashing reads the pixel values once on the host: from a GPU that is a copy and a synchronisation, so keep them on
    the CPU until the call where you can. Weights are taken to change as torch counts it (optimizer steps,
    ``load_state_dict``, moves); call ``clear()`` after changing them through ``.data`` or switching an adapter.

    Args:
        max_bytes: what the entries may hold together; the least recently used go first. An entry that is larger by
            itself is not kept.
        device: where entries are kept, e.g. "cpu" to save GPU memory; None: where they are.

    Raises:
        ValueError: ``max_bytes`` is not positive.
    """

    def __init__(self, max_bytes: int = 4 * 2**30, device: torch.device | str | None = None) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        self.max_bytes = max_bytes
        self.device = None if device is None else torch.device(device)
        self.hits = 0
        """Calls that were found."""
        self.misses = 0
        """Calls that ran the vision tower."""
        self._entries: OrderedDict[bytes, tuple[Encoded, int]] = OrderedDict()
        self._model: weakref.ref[nn.Module] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the entries hold."""
        return sum(size for _, size in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget every entry; the model and the counts stay."""
        self._entries.clear()

    def bind(self, model: nn.Module) -> None:
        """Take the cache for ``model``. Raises ValueError where it is another's."""
        if self._model is None:
            self._model = weakref.ref(model)
        elif self._model() is not model:
            raise ValueError("this VideoCache belongs to another model; give every model one of its own")

    def get(self, key: bytes, vision: bool) -> Encoded | None:
        """The entry of ``key``, every tensor on the device it came from; None where there is none, or one without the
        projector's input although ``vision`` asks for it. Counts."""
        found = self._entries.get(key)
        if found is None or (vision and found[0].vision is None):
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        entry = found[0]
        return Encoded(_restored(entry.output), _restored(entry.vision))

    def put(self, key: bytes, output: Any, vision: torch.Tensor | None) -> None:
        """Keep what the encoder gave, and drop what was used least recently until it fits."""
        store = _storing(self.device)
        entry = Encoded(store(_without_layers(output)), store(vision))
        storages = [leaf.tensor.untyped_storage() for leaf in tree_leaves(entry.output) if isinstance(leaf, _Stored)]
        storages += [] if vision is None else [entry.vision.tensor.untyped_storage()]
        size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        self._entries.pop(key, None)
        if size > self.max_bytes:
            return
        self._entries[key] = entry, size
        while self.nbytes > self.max_bytes:
            self._entries.popitem(last=False)

    def __deepcopy__(self, memo: dict) -> "VideoCache":
        """An empty one, for the copy of the model."""
        return VideoCache(self.max_bytes, self.device)

    def __repr__(self) -> str:
        return f"<VideoCache: {len(self)} entries, {self.nbytes:,} bytes, {self.hits} hits, {self.misses} misses>"


def content_key(arguments: Mapping[str, Any], weights: Iterable[torch.Tensor], state: tuple) -> bytes:
    """What a call of an encoder is found by.

    Args:
        arguments: of the call, by name: tensors, numbers, text, and lists, tuples and dicts of them.
        weights: the encoder's parameters and buffers; what counts is where they lie and how often they changed.
        state: what else its result depends on, hashed by its repr.

    Raises TypeError for an argument of another type.
    """
    digest = hashlib.blake2b(digest_size=32)
    versions = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in weights]
    digest.update(repr((versions, state)).encode())
    for name in sorted(arguments):
        digest.update(repr(name).encode())
        _hash(digest.update, arguments[name], name)
    return digest.digest()


def _hash(update: Callable[[Any], None], value: Any, name: str) -> None:
    if isinstance(value, torch.Tensor):
        update(repr((value.dtype, tuple(value.shape))).encode())
        update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        update(repr(list(value)).encode())
        for item in value.values():
            _hash(update, item, name)
    elif isinstance(value, list | tuple):
        update(f"[{len(value)}]".encode())
        for item in value:
            _hash(update, item, name)
    elif value is None or isinstance(value, _SCALARS):
        update(repr(value).encode())
    else:
        raise TypeError(
            f"a VideoCache can't look up a call whose {name} is a {type(value).__name__}: leave it out, or attach "
            "without cache="
        )


def _without_layers(output: Any) -> Any:
    if not isinstance(output, Mapping):
        return output
    return type(output)(**{name: value for name, value in output.items() if name not in _NOT_KEPT})


def _storing(device: torch.device | None) -> Callable[[Any], Any]:
    """A function that replaces the tensors in something by stored ones; a tensor that comes twice is kept once."""
    known: dict[int, _Stored] = {}

    def store(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in known:
            known[id(leaf)] = _Stored(leaf if device is None else leaf.to(device), leaf.device)
        return known[id(leaf)]

    return lambda value: tree_map(store, value)


def _restored(value: Any) -> Any:
    """What was stored, in containers of its own: generate() changes those that it is given."""
    return tree_map(lambda leaf: leaf.tensor.to(leaf.device) if isinstance(leaf, _Stored) else leaf, value)
