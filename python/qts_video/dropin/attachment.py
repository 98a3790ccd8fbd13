"""The hooks that put a selector into a model: on the model, its multimodal part, its decoder and its vision
tower."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qts_video.adapters import Adapter
from qts_video.cache import VideoCache
from qts_video.dropin.decode import check_continuation, translate_decoder_inputs
from qts_video.dropin.dropped import forget_if_reset, recall, remember
from qts_video.dropin.generation import Generation, arguments_by_name, check_generate, read_generation
from qts_video.dropin.layout import to_host
from qts_video.dropin.prefill import Call, Prefill, add_question, find_seconds, pack_videos, shorten_decoder_inputs
from qts_video.dropin.questions import Questions
from qts_video.dropin.report import Report
from qts_video.dropin.shorten import kept_columns
from qts_video.dropin.stopwatch import Stopwatch
from qts_video.dropin.vision import VideoEncoder
from qts_video.methods.base import Selector

ATTRIBUTE = "_qts_video_attachment"
_OWN_MASKS = "_prepare_4d_causal_attention_mask_with_cache_position"


class Attachment:
    """A selector in a model. Hooks on four modules, and two methods of instances that have no hook of their
    own: ``generate`` of the model (to refuse what can't work, and to see the inputs that it takes away) and
    ``create_masks_for_generate`` of its generator, or the one of its own that it has instead (so that masks built
    ahead for a compileable cache fit the shortened sequence). Where the selector wants the vision tower's features, or
    a cache or chunks are given, what encodes videos is replaced as well. ``remove`` undoes it all.

    Hooks and methods are bound to this object, so that a deep copy of the model gets an attachment of its
    own.
    """

    def __init__(
        self,
        model: nn.Module,
        selector: Selector,
        adapter: Adapter,
        processor: Any | None,
        compact: bool,
        cache: VideoCache | None = None,
        vision_chunk_frames: int | None = None,
    ) -> None:
        self.model, self.selector, self.adapter, self.processor = model, selector, adapter, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.compact = compact
        self.parts = adapter.parts(model)
        self.generator = model if self.parts.generator is None else self.parts.generator
        self.questions = Questions(model, adapter, self.tokenizer, selector.name)
        self.given_seconds: list[float] | None = None
        self.report: Report | None = None
        self.prefills = 0
        self._generation: Generation | None = None
        self._call: Call | None = None
        self._in_model = False
        self._positions_given = True
        self._selecting = False
        self._stopwatch = Stopwatch()

        self._unhooked_generate = model.generate
        self._unhooked_masks = getattr(self.generator, "create_masks_for_generate", None)
        methods = [
            (model, "generate", self._generate),
            (self.generator, "create_masks_for_generate", self._create_masks),
            (model, ATTRIBUTE, self),
        ]
        self._unhooked_own_masks = getattr(self.generator, _OWN_MASKS, None)
        if self._unhooked_own_masks is not None:
            methods.append((self.generator, _OWN_MASKS, self._create_own_masks))
        self.needs_vision = getattr(selector, "needs_vision", False)
        if self.needs_vision or cache is not None or vision_chunk_frames is not None:
            on_features = self._keep_vision if self.needs_vision else None
            encoder = VideoEncoder(model, adapter, cache, on_features, vision_chunk_frames)
            methods.append((self.parts.base, adapter.video_encoder, encoder))
        self._replaced = [(module, name, module.__dict__.get(name)) for module, name, _ in methods]
        base, decoder, vision = self.parts.base, self.parts.decoder, self.parts.vision
        self._hooks = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
            base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            base.register_forward_hook(self._after_base, always_call=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
            vision.register_forward_pre_hook(self._before_vision),
            vision.register_forward_hook(self._after_vision),
        ]
        for module, name, method in methods:
            setattr(module, name, method)

    @property
    def attached(self) -> bool:
        return bool(self._hooks)

    def remove(self) -> None:
        """Take every hook and method out of the model. Does nothing the second time."""
        if not self.attached:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for module, name, before in self._replaced:
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)

    # The model: opens the call where it holds videos, and computes the loss, whose labels must lose the same
    # columns.

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._selecting:
            return None
        self._call, self._in_model = None, True
        inputs = _by_name(module, args, kwargs)
        self._call = call = self._open(module, inputs)
        if call is None:
            return None
        if call.copies > 1:
            inputs = self.adapter.regroup_copies(self.model, inputs, call.layout, call.copies)
        if inputs.get("labels") is None:
            return (), inputs
        if inputs.get("shift_labels") is not None:
            raise ValueError("shift_labels is not supported while a selector is attached; give labels alone")
        call.labels = inputs["labels"]
        named = inspect.signature(type(module).forward).parameters
        call.loss_kwargs = {k: v for k, v in inputs.items() if k not in named and k != "return_dict"}
        return (), {**inputs, "labels": None}

    def _after_model(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._selecting:
            return None
        call, self._call, self._in_model = self._call, None, False
        if call is None or output is None:  # None: the forward raised
            return None
        self._check_selected(call)
        return output if call.labels is None else self._with_loss(output, call)

    def _with_loss(self, output: Any, call: Call) -> Any:
        labels = call.labels if call.columns is None else call.columns.gather(call.labels, fill=-100)
        logits = output[0] if isinstance(output, tuple) else output.logits
        vocab_size = self.generator.config.get_text_config().vocab_size
        loss = self.generator.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **call.loss_kwargs)
        if isinstance(output, tuple):
            return (loss, *output)
        return type(output)(**{"loss": loss, **output})

    # The multimodal part: the same, where it is called by itself.

    def _before_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._selecting:
            return
        inputs = _by_name(module, args, kwargs)
        if not self._in_model:
            self._call = None
            self._call = self._open(module, inputs)
        # Until transformers 5 some models count on from cache_position, which is the caller's too.
        self._positions_given = any(inputs.get(name) is not None for name in ("position_ids", "cache_position"))

    def _after_base(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._selecting:
            return
        self._positions_given = True
        call = self._call
        if call is None:
            self._stopwatch = Stopwatch()  # it has timed images without a video
            return
        if call.opened_by is module:
            self._call = None
        if output is not None:
            self._check_selected(call)

    def _check_selected(self, call: Call) -> None:
        if not call.selected:
            raise RuntimeError(
                f"{self.selector.name} is attached, but selected nothing: the decoder ran past its hooks "
                "(was a forward replaced?)"
            )

    def _open(self, module: nn.Module | None, inputs: Mapping[str, Any]) -> Call | None:
        """The call, if it is a prefill with videos. Reads the prompt from the device, once."""
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if ids is None and embeds is None:
            return None  # the model says what is wrong
        fed = (embeds if ids is None else ids).shape[1]
        past_length = self._check_cache(inputs, fed)
        if ids is None:
            if self.adapter.has_video_features(inputs):
                raise ValueError(
                    "videos can't be located in inputs_embeds alone: give input_ids too, to the model's forward"
                )
            return None
        if fed == 1:
            return None

        source = inputs if self._generation is None else self._generation.arguments
        mask = inputs.get("attention_mask")
        integers = {name: source.get(name) for name in self.adapter.host_inputs}
        integers |= {"input_ids": ids, "attention_mask": mask if _is_2d(mask) else None}
        host = to_host({name: torch.as_tensor(value) for name, value in integers.items() if value is not None})
        prompt = host["input_ids"]
        if not self.adapter.holds_video(self.model, prompt, self.tokenizer):
            return None

        if not self.adapter.has_video_features(inputs):
            raise ValueError("input_ids hold video placeholders, but no video was given with them")
        if mask is not None and not _is_2d(mask):
            raise ValueError(
                "attention_mask must be [B, L] where videos are selected from; a 4-D mask can't be shortened"
            )
        if self.adapter.needs_token_types(self.model) and all(
            source.get(name) is None for name in ("mm_token_type_ids", "position_ids")
        ):
            raise ValueError(
                "mm_token_type_ids is missing: without it, this transformers version silently gives video tokens 1-D "
                "positions. The processor returns it (return_mm_token_type_ids=True); it is 2 where input_ids are the "
                "video token, 1 where they are the image token, else 0"
            )
        valid = torch.ones(prompt.shape, dtype=torch.bool)
        if mask is not None:
            past = recall(inputs.get("past_key_values"))
            seen = past_length + (past.removed if past else 0)
            if tuple(mask.shape) != (len(prompt), seen + fed):
                raise ValueError(f"attention_mask must be {[len(prompt), seen + fed]}, got {list(mask.shape)}")
            valid = host["attention_mask"][:, seen:] != 0

        copies = 1 if self._generation is None else self._generation.copies(len(prompt))
        layout = self.adapter.locate(self.model, prompt[::copies], valid[::copies], {**source, **host}, self.tokenizer)
        if not layout.lengths:
            return None
        seconds, seconds_from = find_seconds(
            layout, self.given_seconds, self.adapter.seconds_per_step(source), self.adapter.default_seconds_per_step
        )
        return Call(module, ids[::copies], layout, copies, seconds, seconds_from, past_length)

    def _check_cache(self, inputs: Mapping[str, Any], fed: int) -> int:
        """Slots of the cache that are filled; 0 where nobody needs to know. Raises where the inputs do not
        continue it."""
        cache = inputs.get("past_key_values")
        if cache is None or (fed == 1 and cache.is_compileable):
            return 0
        if fed > 1:
            forget_if_reset(cache)
        past_length, dropped = int(cache.get_seq_length()), recall(cache)
        if dropped is not None:
            mask = inputs.get("attention_mask")
            if mask is not None and not _is_2d(mask) and self._generation is None:
                raise ValueError("attention_mask must be [B, L] for a cache that tokens were dropped from")
            check_continuation(dropped, past_length, fed, mask, inputs.get("position_ids"))
        return past_length

    # The decoder: selects and shortens at a prefill with videos, translates what continues a shortened cache.

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._selecting:
            return None
        if self._call is not None:
            return (), self._select(self._call, _by_name(module, args, kwargs))
        dropped = recall(kwargs.get("past_key_values"))
        if dropped is None:
            return None
        cache = kwargs["past_key_values"]
        masks_are_made = kwargs.get("attention_mask") is not None and not _is_2d(kwargs["attention_mask"])
        past_length = None if masks_are_made else int(cache.get_seq_length())
        inputs = _by_name(module, args, kwargs)
        axes = self.adapter.rope_axes
        return (), translate_decoder_inputs(inputs, dropped, past_length, self._positions_given, axes)

    def _select(self, call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run the selector, once, and take what it dropped out of the decoder's ``inputs``."""
        if call.selected:
            raise RuntimeError("the decoder ran twice in one forward call: its prefill can't be shortened")
        if call.opened_by is None:  # only now has generate() repeated the samples
            call.copies = self._generation.copies(len(inputs["inputs_embeds"]))
        layout, copies = call.layout, call.copies
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        embeds = inputs["inputs_embeds"][::copies]
        self._stopwatch.start("selection", embeds.device)
        videos = pack_videos(call, embeds)
        if self.selector.needs_question:
            add_question(videos, self.questions.of_videos(layout), self.generator.get_input_embeddings())
        videos.context = Prefill(
            model=self.model,
            adapter=self.adapter,
            layout=layout,
            input_ids=call.input_ids,
            inputs_embeds=embeds,
            position_ids=None if positions is None else positions[..., ::copies, :],
            attention_mask=None if mask is None else mask[::copies],
            find_question=lambda video: self.questions.locate(layout, layout.sample[video]),
            decoder_inputs=inputs,
            copies=copies,
            tokenizer=self.processor,
            drops_empty_steps=getattr(self.selector, "drops_empty_steps", False),
            vision=self._vision(call) if self.needs_vision else None,
        )
        self._selecting = True
        try:
            selection = self.selector.select(videos)
        finally:
            self._selecting = False
        kept = videos.context.check(selection, videos, self.selector.name)
        tokens = None if selection.tokens is None else selection.tokens[: len(kept.indices)]
        columns = kept_columns(layout, kept)
        past = recall(inputs.get("past_key_values"))
        whole = kept.counts == layout.lengths and tokens is None and past is None and not self.compact
        if not whole:
            call.columns = columns.repeat(copies)
            tokens = None if tokens is None else tokens.repeat(copies, 1)
            inputs, call.dropped = shorten_decoder_inputs(
                inputs, call, call.columns, tokens, past, self.compact, self.adapter
            )
        call.selected = True
        self.prefills += 1
        self._stopwatch.stop("selection", embeds.device)
        self.report = Report(
            selector=self.selector.name,
            positions="compact" if self.compact else "original",
            layout=layout,
            kept=kept,
            scores=selection.scores,
            timestamps=videos.timestamps,
            seconds_from=call.seconds_from,
            columns=columns.source,
            notes=(*selection.notes, *kept.notes),
            stopwatch=self._stopwatch,
        )
        self._stopwatch.start("prefill", embeds.device)
        return inputs

    def _keep_vision(self, features: torch.Tensor) -> None:
        holder = self._generation if self._call is None else self._call
        if holder is not None and not self._selecting:
            holder.vision = features

    def _vision(self, call: Call) -> torch.Tensor:
        """What went into the projector, of every sample once."""
        features = call.vision
        if features is None and self._generation is not None:
            features = self._generation.vision
        if features is None:
            raise RuntimeError(
                f"{self.selector.name} needs the vision tower's features, but the videos were encoded before this "
                "call: give their pixels"
            )
        return self.adapter.vision_in_order(self.model, features, call.layout, call.copies)

    def _after_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        call = self._call
        if self._selecting or call is None:
            return
        self._stopwatch.stop("prefill", call.input_ids.device)
        self._stopwatch = Stopwatch()
        cache = _cache_of(kwargs, output)
        if cache is not None and call.dropped is not None:
            remember(cache, call.dropped)
        if call.opened_by is None:
            self._call = None

    # The vision tower: only timed.

    def _before_vision(self, module: nn.Module, args: tuple) -> None:
        if not self._selecting:
            self._stopwatch.start("vision", next(module.parameters()).device)

    def _after_vision(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._selecting:
            self._stopwatch.stop("vision", next(module.parameters()).device)

    # Methods of the model.

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if self._selecting:
            return self._unhooked_generate(*args, **kwargs)
        generation = read_generation(
            self.model, args, kwargs, lambda ids: self.adapter.holds_video(self.model, ids, self.tokenizer)
        )
        check_generate(generation, self.generator.generation_config)
        cache = generation.arguments.get("past_key_values")
        fresh = cache is None or int(cache.get_seq_length()) == 0
        prefills, outer = self.prefills, self._generation
        self._generation = generation
        try:
            if self.generator is not self.model:  # the model's forward, which opens calls, does not run
                self._call = self._open(None, generation.arguments)
            output = self._unhooked_generate(*args, **kwargs)
        finally:
            self._generation = outer
            if self.generator is not self.model:
                self._call = None
        if generation.has_video and fresh and self.prefills == prefills:
            raise RuntimeError(f"{self.selector.name} is attached, but selected nothing: generate() ran past its hooks")
        return output

    def _create_masks(self, **kwargs: Any) -> Any:
        """Masks for a compileable cache, which generate() makes before the model runs."""
        from transformers import masking_utils

        create = self._unhooked_masks or masking_utils.create_masks_for_generate
        fed = kwargs.get("inputs_embeds", kwargs.get("input_embeds")).shape[1]  # input_embeds until transformers 5
        return self._translate_masks(create, fed, kwargs)

    def _create_own_masks(self, attention_mask: Any, sequence_length: int, **kwargs: Any) -> Any:
        """The same, where generate() leaves it to a method of the model's own (LLaVA, on transformers 4)."""
        kwargs |= {"attention_mask": attention_mask, "sequence_length": sequence_length}
        return self._translate_masks(self._unhooked_own_masks, sequence_length, kwargs)

    def _translate_masks(self, create: Any, fed: int, kwargs: dict[str, Any]) -> Any:
        """At a prefill with videos the mask is left 2-D: nothing is selected yet, and the decoder makes its own
        from the shortened one. On a shortened cache the 4-D masks are made from the translated 2-D mask.
        """
        if self._selecting or self._generation is None:
            return create(**kwargs)
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if fed > 1:
            forget_if_reset(cache)
            if self._generation.has_video:
                return mask
        dropped = recall(cache)
        if dropped is None:
            return create(**kwargs)
        if fed > 1:
            check_continuation(dropped, int(cache.get_seq_length()), fed, mask, kwargs.get("position_ids"))
        # Ones up to the last slot: causality hides those that are not filled, and the shape stays the same at
        # every step.
        slots = cache.get_max_length() if hasattr(cache, "get_max_length") else cache.get_max_cache_shape()
        kwargs["attention_mask"] = dropped.mask_2d(mask, fed=slots - dropped.kept)
        if kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = kwargs["cache_position"] - dropped.removed
        return create(**kwargs)


def _by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of ``module``'s forward as keywords."""
    if not args:
        return dict(kwargs)
    return arguments_by_name(type(module).forward, module, args, kwargs)


def _is_2d(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.ndim == 2


def _cache_of(kwargs: dict[str, Any], output: Any) -> Any:
    """The cache that a decoder call filled: the one it was given, or the one it made."""
    if kwargs.get("past_key_values") is not None:
        return kwargs["past_key_values"]
    if isinstance(output, tuple):
        return next((item for item in output if hasattr(item, "get_seq_length")), None)
    return output.past_key_values
