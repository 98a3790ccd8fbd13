"""A tiny InternVLChatModel, as the checkpoints' own code has it: its generate() embeds the prompt and runs that of the
language model, Qwen2 of transformers or an InternLM2 of its own."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import tiny_internvl
import torch
from tiny import HIDDEN, IMAGE, PAD, TEXT
from tiny_internlm2 import InternLM2Config, InternLM2ForCausalLM
from tiny_internvl import PATCH, SIZE
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

WIDTH = 32


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, llm_config=None, **options):
        super().__init__(**options)
        self.llm_config = llm_config
        self.vision_config = PretrainedConfig(image_size=SIZE, patch_size=PATCH)
        self.downsample_ratio = 0.5


class InternVisionModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.patch_embedding = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 48, dropout=0.0, batch_first=True)

    def forward(self, pixel_values):
        patches = self.patch_embedding(pixel_values.to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], 1)
        return SimpleNamespace(last_hidden_state=self.layer(hidden))


class InternVLChatModel(PreTrainedModel):
    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config, language_model):
        super().__init__(config)
        self.num_image_token = int((SIZE // PATCH) ** 2 * config.downsample_ratio**2)
        self.img_context_token_id = None
        self.vision_model = InternVisionModel()
        self.language_model = language_model
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)
        )

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def extract_feature(self, pixel_values):
        """[tiles, tokens, HIDDEN]: 2 x 2 patches are one token."""
        hidden = self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 1:]
        side = SIZE // PATCH // 2
        blocks = hidden.view(len(hidden), side, 2, side, 2, WIDTH).transpose(2, 3)
        return self.mlp1(blocks.reshape(len(hidden), side * side, 4 * WIDTH))

    def embed(self, input_ids, features):
        """The embeddings of ``input_ids`` with ``features`` where the placeholders are."""
        embeds = self.language_model.get_input_embeddings()(input_ids)
        batch, length, width = embeds.shape
        embeds = embeds.reshape(batch * length, width).clone()
        embeds[input_ids.reshape(-1) == self.img_context_token_id] = features.reshape(-1, width).to(embeds.dtype)
        return embeds.view(batch, length, width)

    def forward(
        self,
        pixel_values,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        image_flags=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        features = self.extract_feature(pixel_values)
        if image_flags is not None:
            features = features[image_flags.squeeze(-1) == 1]
        outputs = self.language_model(
            inputs_embeds=self.embed(input_ids, features),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        loss = None
        if labels is not None:
            logits = outputs.logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        if return_dict is False:
            output = (outputs.logits, outputs.past_key_values)
            return output if loss is None else (loss, *output)
        return CausalLMOutputWithPast(loss=loss, logits=outputs.logits, past_key_values=outputs.past_key_values)

    @torch.no_grad()
    def generate(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        visual_features=None,
        generation_config=None,
        output_hidden_states=None,
        **generate_kwargs,
    ):
        assert self.img_context_token_id is not None
        if pixel_values is not None:
            features = self.extract_feature(pixel_values) if visual_features is None else visual_features
            embeds = self.embed(input_ids, features)
        else:
            embeds = self.language_model.get_input_embeddings()(input_ids)
        return self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            use_cache=True,
            **generate_kwargs,
        )

    def chat(self, tokenizer, pixel_values, question, generation_config, num_patches_list):
        """One question about images and frames, each an ``<image>`` in the text."""
        self.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        for tiles in num_patches_list:
            image = "<img>" + "<IMG_CONTEXT>" * self.num_image_token * tiles + "</img>"
            question = question.replace("<image>", image, 1)
        query = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(query, add_special_tokens=False)])
        output = self.generate(
            pixel_values=pixel_values, input_ids=ids, attention_mask=torch.ones_like(ids), **generation_config
        )
        return tokenizer.decode(output[0].tolist())


LANGUAGE_MODELS = {
    "qwen2": lambda attn: Qwen2ForCausalLM(Qwen2Config(**TEXT, attn_implementation=attn)),
    "internlm2": lambda attn: InternLM2ForCausalLM(InternLM2Config()),
}


def build_model(attn: str = "sdpa", *, language_model: str = "qwen2") -> InternVLChatModel:
    torch.manual_seed(0)
    model = InternVLChatModel(InternVLChatConfig(), LANGUAGE_MODELS[language_model](attn)).double().eval()
    model.img_context_token_id = IMAGE
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # its attention not flat, as ``tiny.ready`` has it
            if any(part in name for part in ("q_proj", "k_proj", "wqkv")):
                parameter.mul_(8)
    model.language_model.generation_config.eos_token_id = None
    model.language_model.generation_config.pad_token_id = PAD
    return model


SKIPS = {
    "test_decoding_by_hand": "the remote forward encodes images at every call: see test_internvl_chat.py",
    "test_other_ways_to_generate.*no cache": "transformers always takes a cache where it starts from embeddings",
    "test_other_ways_to_generate.*beam": "without a cache there is nothing to compare with: see test_internvl_chat.py",
    "test_attach_finds_the_adapter": "the remote class is told by its parts: see test_internvl_chat.py",
}
FAMILIES = [
    replace(
        tiny_internvl.FAMILY,
        name=name,
        build_model=partial(build_model, language_model=language_model),
        vision="vision_model",
        second_turn=False,
        skips=SKIPS,
    )
    for name, language_model in (("internvl_chat", "qwen2"), ("internvl_chat internlm2", "internlm2"))
]
