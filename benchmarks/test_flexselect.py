"""FlexSelect: the scores of one reference layer, and what selection saves of a prefill.

Weights are random, at the shapes of the checkpoints on a GPU and smaller ones on a CPU: times do not depend on their
values. The vision tower is left out (one narrow layer): these are costs of the language model.
"""

import pytest
import qwen2_5_vl
import torch

import qts_kernels
from qts_kernels.testing import assert_within_budget

GPU = torch.cuda.is_available()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128
PREFIX, TEXT = 14, 64
VISION = (50_176, 12_544, 4096) if GPU else (4096,)


def eager_scores(query, key, columns):
    """[1, L, H, Dh], [1, N, Hkv, Dh] -> the mask, the attention matrix and its softmax in memory; L last rows of N."""
    length, number = query.shape[1], key.shape[1]
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * query.shape[-1] ** -0.5
    seen = torch.ones(length, number, dtype=torch.bool, device=query.device).tril(number - length)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights[:, :, -TEXT:, slice(*columns)].amax((1, 2))


@pytest.mark.parametrize("who", ["qts_kernels", "eager, text rows alone", 'attn_implementation="eager"'])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vision", VISION)
@torch.inference_mode()
def test_scores_of_a_layer(timed, device, vision, dtype, who):
    """Rotated queries and keys given. A user of eager attention gets the weights of every row, and takes the text's."""
    if vision > 4096 and who == 'attn_implementation="eager"':
        pytest.skip(f"its matrix takes {HEADS * vision**2 * 8 / 1e9:.0f} GB")
    torch.manual_seed(0)
    rows = PREFIX + vision + TEXT
    query = torch.randn(1, rows, HEADS, HEAD_DIM, device=device).to(DTYPES[dtype])
    key = torch.randn(1, rows, KV_HEADS, HEAD_DIM, device=device).to(DTYPES[dtype])
    text, columns = query[:, -TEXT:].contiguous(), (PREFIX, PREFIX + vision)
    runs = {
        "qts_kernels": lambda: qts_kernels.relevance(text, key, causal=True, columns=columns),
        "eager, text rows alone": lambda: eager_scores(text, key, columns),
        'attn_implementation="eager"': lambda: eager_scores(query, key, columns),
    }
    if who == "qts_kernels":
        exact = eager_scores(text.double(), key.double(), columns)
        assert_within_budget(runs[who](), runs["eager, text rows alone"](), exact, atol=1e-7)
    shape = f"{dtype} M={vision} L={TEXT} heads={HEADS}/{KV_HEADS}"
    timed("FlexSelect scores of a layer", shape, who, runs[who], graph=who == "qts_kernels")


# (layers, width, heads, key heads, feed-forward, reference layer, tokens a frame, budget), as Qwen2.5-VL-7B, or small.
MODEL = (28, 3584, 28, 4, 18944, 20, 196, 7040) if GPU else (8, 512, 8, 2, 2048, 5, 64, 440)
FRAMES = (64, 128, 256, 512) if GPU else (16, 64)
FRAMES_PER_SET = 64 if GPU else 16


@pytest.fixture(scope="module")
def model(device):
    return qwen2_5_vl.build(*MODEL[:5], device)


def prompt(model, frames):
    """A prompt with a video of ``frames`` time steps, and what the model is given beside it."""
    side = int(MODEL[6] ** 0.5)
    ids = [*range(1, PREFIX), 1002, *[1001] * (frames * side * side), 1003, *range(20, 19 + TEXT)]
    device = model.device
    ids = torch.tensor([ids], device=device)
    pixels = torch.randn(frames * side * side * 4, 3 * 2 * 14 * 14, device=device, dtype=model.dtype)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[frames, 2 * side, 2 * side]], device=device),
        "second_per_grid_ts": torch.ones(1),
        "mm_token_type_ids": (ids == 1001).long() * 2,
    }


def flops(tokens, layers, score=False):
    """Of a prefill through some layers; of the causal attention's triangle, half of its square."""
    _, width, heads, kv_heads, inner, *_ = MODEL
    head = width // heads
    of_token = 2 * width * (2 * width + 2 * kv_heads * head) + 6 * width * inner
    whole = layers * (tokens * of_token + 2 * tokens * tokens * width)
    return whole + (tokens * 2 * width * (width + kv_heads * head) if score else 0)


class EagerScores:
    """Selection with what transformers offers: attention weights of a forward with eager attention."""

    name, needs_question = "eager", False

    def __init__(self, layer, budget):
        self.layer, self.budget = layer, budget

    def select(self, videos):
        from qts_video.methods.uniform import packed_selection

        context = videos.context
        length = context.input_ids.shape[1]
        kept = {}

        def remember(module, args, output):
            kept["scores"] = output[1][0, :, -TEXT:, PREFIX : length - TEXT].amax((0, 1))

        hook = context.decoder.layers[self.layer].self_attn.register_forward_hook(remember)
        implementation = context.decoder.config._attn_implementation
        context.model.set_attn_implementation("eager")
        try:
            context.decoder(
                inputs_embeds=context.inputs_embeds,
                position_ids=context.position_ids,
                attention_mask=context.attention_mask,
                use_cache=False,
            )
        finally:
            hook.remove()
            context.model.set_attn_implementation(implementation)
        best = kept["scores"].topk(self.budget).indices.sort().values
        return packed_selection(best, [self.budget], best.device)


@pytest.mark.parametrize("who", ["qts_kernels", "unselected", "eager attention scores"])
@pytest.mark.parametrize("frames", FRAMES)
@torch.inference_mode()
def test_prefill(timed, device, model, frames, who, benchmark):
    """Selection and the prefill after it, by frames; peak memory and the FLOPs' ratio beside the times."""
    import warnings

    import qts_video
    from qts_video.measure import measure
    from qts_video.methods import FlexSelect

    layers, *_, layer, area, budget = MODEL
    total = frames * area
    if who == "eager attention scores" and total > 13_000:
        pytest.skip("the attention matrix of every layer does not fit")
    inputs = prompt(model, frames)
    selector = {
        "qts_kernels": FlexSelect(layer=layer, max_tokens=budget, frames_per_set=FRAMES_PER_SET),
        "eager attention scores": EagerScores(layer, budget),
    }.get(who)
    handle = None if selector is None else qts_video.attach(model, selector)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it costs more than it saves at few frames: that is what is measured
            with measure(model) as took:
                output = model(**inputs, logits_to_keep=1)
            if handle is not None:
                assert handle.last.kept == min(budget, total)
                assert output.past_key_values.get_seq_length() == PREFIX + TEXT + budget
            benchmark.extra_info["peak_mb"] = round(took.peak_bytes / 2**20)
            set_length = PREFIX + TEXT + min(FRAMES_PER_SET, frames) * area
            sets = -(-frames // FRAMES_PER_SET)
            ours = sets * flops(set_length, layer, score=True) + flops(PREFIX + TEXT + budget, layers)
            benchmark.extra_info["flop_ratio"] = round(flops(PREFIX + TEXT + total, layers) / ours, 2)
            shape = f"{str(model.dtype)[6:]} frames={frames} M={total} kept={budget} layer={layer}/{layers}"
            run = lambda: model(**inputs, logits_to_keep=1)  # noqa: E731
            timed("FlexSelect + prefill", shape, who, run, graph=False)
    finally:
        if handle is not None:
            handle.remove()
