"""Relevance by early exit, in every model: what it equals, what it leaves alone, what it refuses."""

import math
from itertools import pairwise

import pytest
import qts_video
import torch
from exact_attention import exact_attention
from qts_video.adapters import find_adapter
from qts_video.flexselect.relevance import relevance_by_layer
from tiny import IMAGE, VIDEO, Keep, keep_all

LAYERS = [0, 1, 2]
NAMES = pytest.mark.parametrize("name", ["one", "unequal", "several"])
REDUCE = pytest.mark.parametrize("reduce", ["max", "mean"])
pytestmark = pytest.mark.filterwarnings("ignore:training-free FlexSelect")


class Scores(Keep):
    """Keeps everything and remembers the relevance of every token in ``LAYERS``, in float64."""

    def __init__(self, layers=LAYERS, **options):
        super().__init__(keep_all)
        self.layers, self.options = layers, options

    def select(self, videos):
        self.videos = videos
        self.scores = relevance_by_layer(videos, self.layers, **self.options)
        return super().select(videos)


def scores_of(model, batch, **options):
    selector = Scores(**options)
    with qts_video.attach(model, selector), torch.no_grad():
        model(**batch)
    return selector.scores


def layout_of(model, batch):
    return find_adapter(model).locate(model, batch["input_ids"], batch["attention_mask"].bool(), batch, None)


def in_a_frame(layout, sample, column):
    return any(
        layout.sample[v] == sample and start <= column < stop
        for v in range(len(layout.lengths))
        for start, stop in layout.frame_spans[v].tolist()
    )


def text_columns(layout, sample, behind):
    ids = layout.input_ids[sample].tolist()
    return [
        c
        for c in range(behind + 1, layout.columns)
        if layout.valid[sample, c] and ids[c] not in (IMAGE, VIDEO) and not in_a_frame(layout, sample, c)
    ]


def reduced(weights, rows, columns, reduce):
    """[H, L, L] -> [columns]: over heads and rows."""
    taken = weights[:, rows][:, :, columns]
    return taken.amax((0, 1)) if reduce == "max" else taken.mean((0, 1))


@REDUCE
@NAMES
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_set_is_the_full_model(family, model, name, side, reduce):
    batch = family.inputs(*family.prompts[name], side=side)
    ours = scores_of(model, batch, reduce=reduce)
    layout = layout_of(model, batch)
    with exact_attention(find_adapter(model).parts(model).decoder, layout.valid) as exact, torch.no_grad():
        model(**batch)
    for layer in LAYERS:
        wanted = []
        for rows, sample in zip(layout.rows.split(layout.lengths), layout.sample, strict=True):
            columns = (rows % layout.columns).tolist()
            text = text_columns(layout, sample, columns[-1])
            wanted.append(reduced(exact.weights[layer][sample], text, columns, reduce))
        torch.testing.assert_close(ours[layer], torch.cat(wanted), rtol=0, atol=1e-10)
    assert (ours[0] - ours[2]).abs().max() > 1e-3


class Captured:
    """What the model passes to its decoder for a whole prefill, sample by sample."""

    def __init__(self, model, batch):
        self.decoder = find_adapter(model).parts(model).decoder
        captured = {}
        hook = self.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True
        )
        with torch.no_grad():
            model(**batch)
        hook.remove()
        self.model, self.batch, self.inputs = model, batch, captured

    def positions(self, sample, columns, layout, steps):
        """Of a prompt with some columns, in the model's own way; ``steps``: time steps of each video in it."""
        kind = self.model.config.model_type
        given = self.inputs.get("position_ids")
        if kind == "qwen2_5_vl":  # where the frames are, in absolute time
            return given[-3:, sample : sample + 1, columns]
        if kind == "qwen3_vl":
            ids = self.batch["input_ids"][sample : sample + 1, columns]
            merge = self.model.config.vision_config.spatial_merge_size
            grids = [(t, layout.grids[v][1] * merge, layout.grids[v][2] * merge) for v, t in steps.items()]
            images = []
            if "image_grid_thw" in self.batch:
                images = [
                    grid
                    for grid, of in zip(self.batch["image_grid_thw"].tolist(), image_samples(self.batch), strict=True)
                    if of == sample
                ]
            options = {
                "image_grid_thw": torch.tensor(images) if images else None,
                "video_grid_thw": torch.tensor(grids),
            }
            if "mm_token_type_ids" in self.batch:
                options["mm_token_type_ids"] = self.batch["mm_token_type_ids"][sample : sample + 1, columns]
            return self.model.model.get_rope_index(ids, **options, attention_mask=torch.ones_like(ids))[0]
        return columns[0] + torch.arange(len(columns))[None]  # no position_ids: left padding is counted

    def weights(self, sample, columns, positions):
        """Of every layer, [H, L, L]: the whole decoder on these columns of a sample."""
        extras = {}
        mask = self.inputs.get("visual_pos_masks")
        if mask is not None:
            number = {place: n for n, place in enumerate(mask.flatten().nonzero().flatten().tolist())}
            places = [sample * mask.shape[1] + c for c in columns]
            features = [number[place] for place in places if place in number]
            extras = {
                "visual_pos_masks": mask[sample : sample + 1, columns],
                "deepstack_visual_embeds": [of[features] for of in self.inputs["deepstack_visual_embeds"]],
            }
        embeds = self.inputs["inputs_embeds"][sample : sample + 1, columns]
        with exact_attention(self.decoder) as exact, torch.no_grad():
            self.decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False, **extras)
        return {layer: found[0] for layer, found in exact.weights.items()}


def image_samples(batch):
    """The sample of every image of a Qwen batch."""
    samples = []
    for sample, ids in enumerate(batch["input_ids"].tolist()):
        samples += [sample for before, after in pairwise(ids) if after == IMAGE and before != IMAGE]
    return samples


def columns_of_set(layout, sample, number, k):
    """The prompt of set k of ``number``, column by column."""
    of_video = layout.newline_rows.split(layout.newlines)
    always = [
        int(of_video[v]) for v in range(len(layout.lengths)) if layout.newline_spans[v] == layout.lengths[v]
    ]  # the newline of a whole video
    columns = []
    for c in range(layout.columns):
        steps = [
            step
            for v, of in enumerate(layout.sample)
            for step, (start, stop) in enumerate(layout.frame_spans[v].tolist())
            if of == sample and start <= c < stop
        ]
        here = not steps or steps[0] % number == k or sample * layout.columns + c in always
        if here and layout.valid[sample, c]:
            columns.append(c)
    return columns


@REDUCE
@NAMES
@pytest.mark.parametrize("frames_per_set", [2, 3])
def test_every_set_is_the_full_model_on_its_prompt(family, model, name, frames_per_set, reduce):
    batch = family.inputs(*family.prompts[name])
    ours = scores_of(model, batch, reduce=reduce, frames_per_set=frames_per_set)
    captured, layout = Captured(model, batch), layout_of(model, batch)
    tokens_of = layout.rows.split(layout.lengths)
    starts = [sum(layout.lengths[:v]) for v in range(len(layout.lengths))]
    wanted = {layer: torch.full((sum(layout.lengths),), math.nan, dtype=torch.float64) for layer in LAYERS}
    most = 0
    for sample in range(layout.batch):
        steps = {v: layout.grids[v][0] for v, of in enumerate(layout.sample) if of == sample}
        number = 1
        while sum(len(range(0, t, number)) for t in steps.values()) > frames_per_set:
            number += 1
        most = max(most, number)
        for k in range(number):
            columns = columns_of_set(layout, sample, number, k)
            here = {v: len(range(k, t, number)) for v, t in steps.items() if k < t}
            weights = captured.weights(sample, columns, captured.positions(sample, columns, layout, here))
            for v in here:
                column = (tokens_of[v] % layout.columns).tolist()
                area = layout.grids[v][1] * layout.grids[v][2]
                tokens = [i for i in range(layout.lengths[v]) if i // area % number == k]
                text = [columns.index(c) for c in text_columns(layout, sample, column[-1])]
                places = [columns.index(column[i]) for i in tokens]
                for layer in LAYERS:
                    found = reduced(weights[layer], text, places, reduce)
                    wanted[layer][torch.tensor(tokens) + starts[v]] = found
    assert most > 1 or frames_per_set == 3
    for layer in LAYERS:
        torch.testing.assert_close(ours[layer], wanted[layer], rtol=0, atol=1e-10)
