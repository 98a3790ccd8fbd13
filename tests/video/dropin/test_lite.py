"""The Lite selector in every model that it is made for: what it is fed, its scores, and what it leaves alone."""

import pytest
import qts_video
import torch
import transformers
from families import FAMILIES
from qts_video.flexselect.relevance import query_columns, score_sets
from qts_video.flexselect.sets import split_frames
from qts_video.lite import LiteSelector
from qts_video.lite.config import FAMILIES as FITTING
from qts_video.methods import FlexSelect
from tiny import HIDDEN, Keep, keep_all, ready
from transformers.masking_utils import sdpa_mask

SIZES = {"hidden_size": 32, "intermediate_size": 48, "layers": 3, "heads": 4, "kv_heads": 2}
NAMES = pytest.mark.parametrize("name", ["one", "unequal", "several"])


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name.split()[0] in FITTING])
def family(request):
    return FAMILIES[request.param]


def sharpen(lite):
    """As ``tiny.ready``: with the default initialisation, attention is flat."""
    with torch.no_grad():
        for name, parameter in lite.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8)
    return lite


def build_lite(model, **options):
    return sharpen(LiteSelector.build(model, **{**SIZES, **options}))


def read_videos(model, batch, needs_vision=True):
    """What a method that needs vision features is given."""
    selector = Keep(keep_all)
    selector.needs_vision = needs_vision
    with qts_video.attach(model, selector), torch.no_grad():
        model(**batch)
    return selector.calls[0]


def image_token(videos):
    """The placeholder of images."""
    context = videos.context
    return getattr(context.model.config, "image_token_id", None) or context.adapter.video_token_id(context.model)


def score(lite, videos, reduce="max", frames_per_set=64):
    """[sum M] float64."""
    context, scorer = videos.context, lite.scorer(videos)
    sets = split_frames(context.layout, frames_per_set, scorer.left_out)
    with torch.no_grad():
        scores = score_sets(
            scorer,
            [scorer.layer],
            sets,
            query_columns(context, "prompt"),
            len(videos.tokens),
            videos.tokens.device,
            reduce=reduce,
        )
    return scores[scorer.layer]


class Oracle:
    """The small language model in full, its dead parts random, on one unpadded prompt at a time. All its layers attend
    by ``attend``, which keeps the weights of the last."""

    def __init__(self, lite):
        self.lite, config = lite, lite.config
        options = {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "vocab_size": config.vocab_size,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if config.mrope_section is None:
            language_model = transformers.Qwen2Model(transformers.Qwen2Config(**options))
        else:
            rope = {"type": "default", "rope_type": "default", "mrope_section": list(config.mrope_section)}
            whole = transformers.Qwen2_5_VLConfig(text_config={**options, "rope_scaling": rope})
            language_model = transformers.Qwen2_5_VLTextModel(whole.text_config)
        self.language_model = language_model.double().eval()
        missing, unexpected = self.language_model.load_state_dict(lite.decoder.state_dict(), strict=False)
        assert not unexpected
        assert all(f"layers.{config.layers - 1}" in name or name == "norm.weight" for name in missing)
        transformers.AttentionInterface.register("lite_oracle", self.attend)
        transformers.AttentionMaskInterface.register("lite_oracle", sdpa_mask)
        self.language_model.set_attn_implementation("lite_oracle")

    def attend(self, module, query, key, value, mask, **kwargs):
        """query [1, H, L, Dh], rotated. Its own causal mask, and a softmax in float64, where transformers' eager
        attention has one in float32."""
        group, length = query.shape[1] // key.shape[1], query.shape[2]
        logits = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(group, 1)) / query.shape[-1] ** 0.5
        weights = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        if module.layer_idx == self.lite.config.layers - 1:
            self.weights = weights[0]
        output = torch.einsum("bhqk,bhkd->bqhd", weights, value.repeat_interleave(group, 1))
        return output, weights

    def attention(self, embeds, positions):
        """[H, L, L] of the last layer, for ``embeds`` [L, d] at ``positions`` [3, L] or [1, L]."""
        with torch.no_grad():
            self.language_model(
                inputs_embeds=embeds.unsqueeze(0),
                position_ids=positions.unsqueeze(1) if self.lite.config.mrope_section else positions,
                attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
                use_cache=False,
            )
        return self.weights

    def scores(self, videos, reduce, embeds=None, frames_per_set=64):
        """[sum M]: of one strided set after the other, found frame by frame."""
        context, layout = videos.context, videos.context.layout
        if embeds is None:
            embeds = expected_embeds(self.lite, videos)
        ids, found = layout.input_ids, torch.zeros(len(videos.tokens), dtype=torch.float64)
        image, video_token = image_token(videos), context.adapter.video_token_id(context.model)
        text = layout.valid & (ids != image) & (ids != video_token)
        left_out = (ids == image) & (image != video_token)
        for spans, sample in zip(layout.frame_spans, layout.sample, strict=True):
            text[sample, spans[0, 0] : spans[-1, 1]] = False
            left_out[sample, spans[0, 0] : spans[-1, 1]] = False
        starts = [sum(layout.lengths[:video]) for video in range(len(layout.lengths))]
        for sample in set(layout.sample):
            of_sample = [video for video, row in enumerate(layout.sample) if row == sample]
            sets = 1
            while sum(-(-layout.grids[video][0] // sets) for video in of_sample) > frames_per_set:
                sets += 1
            for number in range(sets):
                kept = layout.valid[sample] & ~left_out[sample]
                for video in of_sample:
                    for step, (start, stop) in enumerate(layout.frame_spans[video].tolist()):
                        if step % sets != number:
                            kept[start:stop] = False
                    newlines = layout.newline_rows.split(layout.newlines)[video]
                    if len(newlines) == 1:
                        kept[newlines % layout.columns] = True
                columns = kept.nonzero().squeeze(1).tolist()
                attention = self.attention(embeds[sample][columns], self.positions(videos, sample, columns))
                for video in of_sample:
                    rows = layout.rows.split(layout.lengths)[video] % layout.columns
                    asking = [i for i, c in enumerate(columns) if text[sample, c] and c > rows.max()]
                    weights = attention[:, asking].flatten(0, 1)
                    weights = weights.amax(0) if reduce == "max" else weights.mean(0)
                    for token, column in enumerate(rows.tolist()):
                        if column in columns:
                            found[starts[video] + token] = weights[columns.index(column)]
        return found

    def positions(self, videos, sample, columns):
        context = videos.context
        if self.lite.config.mrope_section is None:
            given = context.position_ids  # a shift of all would change nothing but float32's rounding of the angles
            first = columns[0] if given is None else int(given.expand(len(context.input_ids), -1)[sample, columns[0]])
            return torch.arange(first, first + len(columns)).unsqueeze(0)
        positions = context.position_ids[-3:, sample]
        if context.adapter.positions_carry_time:
            return positions[:, columns]
        # Text positions go on where the column before has ended, wherever columns were left out.
        moved, shift = [], torch.zeros(3, dtype=torch.long)
        for before, column in zip([columns[0] - 1, *columns], columns, strict=False):
            if column != before + 1:
                shift = shift + positions[:, column] - positions[:, before + 1]
            moved.append(positions[:, column] - shift)
        return torch.stack(moved, 1)


def expected_embeds(lite, videos):
    """[B, L, d]: text by its rows, videos in the order of their placeholders, by the projector alone."""
    layout = videos.context.layout
    ids = layout.input_ids
    embeds = lite.decoder.embed_tokens.weight.detach()[ids]
    with torch.no_grad():
        tokens = lite.projector(videos.context.vision)
    if lite.config.family == "internvl":
        embeds[(ids == image_token(videos)) & layout.valid] = tokens
        return embeds
    embeds.view(-1, embeds.shape[-1])[layout.rows] = tokens
    if len(layout.newline_rows):
        embeds.view(-1, embeds.shape[-1])[layout.newline_rows] = lite.image_newline.detach()
    return embeds


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
@NAMES
def test_scores_equal_attention_of_the_whole_small_model(family, model, name, side, reduce):
    lite = build_lite(model)
    videos = read_videos(model, family.inputs(*family.prompts[name], side=side))
    expected = Oracle(lite).scores(videos, reduce)
    assert expected.min() >= 0
    assert expected.max() > 1.5 * expected.min()  # not flat
    torch.testing.assert_close(score(lite, videos, reduce), expected, rtol=0, atol=1e-10)


@NAMES
def test_scores_of_strided_sets(family, model, name):
    lite = build_lite(model)
    videos = read_videos(model, family.inputs(*family.prompts[name]))
    expected = Oracle(lite).scores(videos, "max", frames_per_set=2)
    torch.testing.assert_close(score(lite, videos, frames_per_set=2), expected, rtol=0, atol=1e-10)
    assert not torch.equal(score(lite, videos), expected)


def test_every_parameter_is_used_and_can_be_trained(family, model):
    lite = build_lite(model)
    videos = read_videos(model, family.inputs(*family.prompts["one"]))
    scorer = lite.scorer(videos)
    sets = split_frames(videos.context.layout, 2, scorer.left_out)
    query = query_columns(videos.context, "prompt")
    scores = score_sets(scorer, [scorer.layer], sets, query, len(videos.tokens), videos.tokens.device, reduce="mean")
    scores[scorer.layer].square().sum().backward()
    unused = [name for name, parameter in lite.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not unused


def copy_projector(lite, model):
    """The big model's own projector into that of ``lite``, which is as wide."""
    own = qts_video.adapters.find_adapter(model).projector(model).state_dict()
    names = {
        "llava": {"linear_1": "0", "linear_2": "2"},
        "internvl": {"layer_norm": "0", "linear_1": "1", "linear_2": "3"},
        "qwen": {"norm": "ln_q", "linear_fc1": "mlp.0", "linear_fc2": "mlp.2"},
    }[lite.config.family]
    state = {}
    for name, tensor in own.items():
        module, _, kind = name.rpartition(".")
        state[f"{names.get(module, module)}.{kind}"] = tensor
    lite.projector.load_state_dict(state)


@pytest.mark.parametrize("side", ["left", "right"])
@NAMES
def test_the_projector_is_the_big_models_own(family, model, name, side, monkeypatch):
    """With its weights, the small prompt holds the big model's vision embeddings, each at its own column."""
    lite = LiteSelector.build(model, **{**SIZES, "hidden_size": HIDDEN})
    copy_projector(lite, model)
    if family.name == "qwen2_5_vl":  # whose norm rounds to float32
        monkeypatch.setitem(model.model.visual.merger._modules, "ln_q", lite.projector.ln_q)
    videos = read_videos(model, family.inputs(*family.prompts[name], side=side))
    context = videos.context
    with torch.no_grad():
        lite.decoder.embed_tokens.weight.copy_(model.get_input_embeddings().weight)
        if lite.image_newline is not None:
            lite.image_newline.copy_(model.model.image_newline)
        images = lite.image_columns(context.layout, image_token(videos))
        embeds = lite.embed(context.input_ids, context.layout, context.vision, image_token(videos))
    keep = context.layout.valid & ~images
    torch.testing.assert_close(embeds[keep], context.inputs_embeds[keep], rtol=0, atol=1e-10)
    expected_images = (context.layout.input_ids == image_token(videos)).sum()
    assert images.sum() == (0 if lite.config.family == "internvl" else expected_images)


def test_kept_rows_are_the_big_models_and_its_layers_do_not_run(family, model):
    batch = family.inputs(*family.prompts["unequal"])
    lite = build_lite(model)
    select = FlexSelect(max_tokens=5, selector=lite)
    decoder = qts_video.adapters.find_adapter(model).parts(model).decoder
    runs, lite_runs = [], []
    hooks = [layer.register_forward_pre_hook(lambda module, args: runs.append(module)) for layer in decoder.layers]
    hooks += [layer.register_forward_hook(lambda *args: lite_runs.append(args[0])) for layer in lite.decoder.layers]
    with qts_video.attach(model, select) as handle, torch.no_grad():
        output = model(**batch)
        kept = [video.indices for video in handle.last.videos]
    for hook in hooks:
        hook.remove()
    assert runs == list(decoder.layers)  # once each, for the shortened prompt
    assert lite_runs == 3 * list(lite.decoder.layers)[:-1]  # a set a sample; the last layer never ends

    fixed = Keep(lambda videos: [i + s for i, s in zip(kept, videos.cu_seqlens.tolist(), strict=False)])
    with qts_video.attach(model, fixed), torch.no_grad():
        assert torch.equal(model(**batch).logits, output.logits)


@NAMES
def test_generate(family, model, name):
    """It scores once, at the prefill, whatever generate() repeats."""
    batch = family.inputs(*family.prompts[name])
    lite, scores, projected = build_lite(model), [], []
    lite.projector.register_forward_hook(lambda *args: projected.append(args))
    select = FlexSelect(retention_ratio=0.5, selector=lite)
    with qts_video.attach(model, select) as handle:
        model(**batch)
        scores.append(torch.cat([video.scores for video in handle.last.videos]))
        beams = (1, 2) if family.repeats and name != "several" else (1,)
        for num_beams in beams:
            model.generate(**batch, max_new_tokens=3, do_sample=False, num_beams=num_beams)
            scores.append(torch.cat([video.scores for video in handle.last.videos]))
        assert len(projected) == len(scores)
        assert handle.last.kept < handle.last.total
    for found in scores[1:]:  # generate() counts positions without padding: angles are rounded differently
        torch.testing.assert_close(found, scores[0])


def test_lite_by_path(family, model, tmp_path, recwarn):
    lite = build_lite(model)
    lite.save_pretrained(tmp_path)
    select = FlexSelect.lite(tmp_path, retention_ratio=0.5)
    assert select.needs_vision
    batch = family.inputs(*family.prompts["one"])
    with qts_video.attach(model, select) as handle, torch.no_grad():
        model(**batch)
        scores = handle.last.videos[0].scores
    videos = read_videos(model, batch)
    assert torch.equal(scores, score(lite, videos).float())
    assert FlexSelect.lite(tmp_path, device="cpu", dtype=torch.float32).selector.dtype == torch.float32
    assert not [w for w in recwarn if "FlexSelect" in str(w.message)]  # it saves from few frames on


def test_a_seed_makes_the_same_selector(family, model):
    before = torch.get_rng_state()
    a, b, c = (LiteSelector.build(model, **SIZES, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [lite.projector.state_dict() for lite in (a, b, c)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert not a.training
    assert a.config.vocab_size == len(model.get_input_embeddings().weight)


class TestRefused:
    def test_vision_features_of_another_model(self, family, model):
        videos = read_videos(model, family.inputs(*family.prompts["one"]))
        shape = list(videos.context.vision.shape)
        lite = build_lite(model)
        other = LiteSelector(type(lite.config)(**lite.config.to_dict() | {"vision_size": 7})).double()
        with pytest.raises(ValueError, match=rf"its vision_size is 7.*the model gives \[.*{shape[2]}\]"):
            other.scorer(videos)
        if lite.config.family == "qwen":
            other = LiteSelector(type(lite.config)(**lite.config.to_dict() | {"merge": 3})).double()
            with pytest.raises(ValueError, match=rf"features \[\*, 9, .*its merge 3.*gives \[{shape[0]}, 4, "):
                other.scorer(videos)

    def test_another_family(self, family, model):
        videos = read_videos(model, family.inputs(*family.prompts["one"]))
        config = build_lite(model).config
        changed = {"family": "llava", "mrope_section": None, "merge": None}
        if config.family == "llava":
            changed = {"family": "internvl"}
        other = LiteSelector(type(config)(**config.to_dict() | changed)).double()
        with pytest.raises(ValueError, match=rf"{other.config.family} family, and \w+ of the {config.family} family"):
            other.scorer(videos)

    def test_dtype(self, family, model):
        videos = read_videos(model, family.inputs(*family.prompts["one"]))
        with pytest.raises(ValueError, match=r"Lite selector is torch\.float32 on cpu.*torch\.float64 on cpu: move"):
            build_lite(model).float().scorer(videos)

    def test_vocabulary(self, family, model):
        videos = read_videos(model, family.inputs(*family.prompts["one"]))
        with pytest.raises(ValueError, match=r"vocabulary of 5000 tokens, and \w+ one of 512"):
            build_lite(model, vocab_size=5000).scorer(videos)
        with pytest.raises(ValueError, match=r"holds token id 50\d, and the Lite selector's vocabulary ends at 300"):
            build_lite(model, vocab_size=300).scorer(videos)

    def test_no_vision_features(self, family, model):
        videos = read_videos(model, family.inputs(*family.prompts["one"]), needs_vision=False)
        with pytest.raises(ValueError, match=r"context\.vision is None: a method .* must have needs_vision = True"):
            build_lite(model).scorer(videos)

    def test_number_of_features(self, family, model):
        videos = read_videos(model, family.inputs(*family.prompts["one"]))
        context, lite = videos.context, build_lite(model)
        with pytest.raises(ValueError, match=r"placeholders, but the vision features \[.*make \d+ tokens"):
            lite.embed(context.input_ids, context.layout, context.vision[1:], image_token(videos))


def test_models_without_one():
    model = ready(
        transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                intermediate_size=8,
                vocab_size=16,
            )
        )
    )
    with pytest.raises(TypeError, match=r"no Lite selector fits a Qwen2ForCausalLM .*known model types: internvl, "):
        LiteSelector.build(model)
