"""A tiny InternLM2, as its checkpoints' own code has it: one fused projection of queries, keys and values, and names of
its own."""

import torch
from tiny import TEXT, VERSION
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"

    def __init__(self, **options):
        for name, value in (TEXT | options).items():
            setattr(self, name, value)
        super().__init__(pad_token_id=TEXT["pad_token_id"], tie_word_embeddings=False)


class InternLM2RotaryEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("inv_freq", 1e4 ** -(torch.arange(0, width, 2).double() / width), persistent=False)

    def forward(self, x, position_ids):
        angles = (position_ids[..., None] * self.inv_freq.double()).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


class InternLM2Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.wqkv = nn.Linear(config.hidden_size, (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size)
        self.rotary_emb = InternLM2RotaryEmbedding(self.head_dim)

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, cache_position=None, **kwargs
    ):
        batch, length, _ = hidden_states.shape
        # b q (h gs d): of each key head its queries, its key, its value.
        fused = self.wqkv(hidden_states)
        fused = fused.view(batch, length, self.num_key_value_heads, 2 + self.num_key_value_groups, self.head_dim)
        query = fused[..., : self.num_key_value_groups, :].flatten(2, 3).transpose(1, 2)
        key, value = (fused[..., index, :].transpose(1, 2) for index in (-2, -1))
        cos, sin = self.rotary_emb(value, position_ids)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past_key_value is not None:
            key, value = past_key_value.update(key, value, self.layer_idx, {"cache_position": cache_position})
        output = scaled_dot_product_attention(query, key, value, attention_mask, enable_gqa=True)
        return self.wo(output.transpose(1, 2).flatten(2)), None, past_key_value


class InternLM2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.w2(silu(self.w1(x)) * self.w3(x))


class InternLM2DecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attention, self.feed_forward = InternLM2Attention(config, layer_idx), InternLM2MLP(config)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), **kwargs)[0]
        return (hidden_states + self.feed_forward(self.ffn_norm(hidden_states)),)


class InternLM2PreTrainedModel(PreTrainedModel):
    config_class = InternLM2Config
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


class InternLM2Model(InternLM2PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([InternLM2DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok_embeddings

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        cache_position=None,
        **kwargs,
    ):
        hidden_states = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and use_cache is not False:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        columns = torch.arange(past, past + hidden_states.shape[1], device=hidden_states.device)
        position_ids = columns[None] if position_ids is None else position_ids
        attention_mask = make_mask(attention_mask, columns, past_key_values)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_value=past_key_values,
                cache_position=columns if VERSION < (5,) else None,
            )[0]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def make_mask(mask, columns, cache):
    """[B, 1, q, kv] bool of a mask [B, past + q], or one that is made already."""
    if mask is not None and mask.ndim == 4:
        return mask
    slots = int(columns[-1]) + 1
    if cache is not None and cache.is_compileable:
        slots = cache.get_max_length() if hasattr(cache, "get_max_length") else cache.get_max_cache_shape()
    slots = torch.arange(slots, device=columns.device)
    causal = slots <= columns[:, None]
    if mask is not None:
        seen = nn.functional.pad(mask.bool(), (0, len(slots) - mask.shape[1]))
        causal = causal & seen[:, None, None]
    else:
        causal = causal[None, None]
    return causal | (slots == columns[:, None])  # a row of padding sees itself


class InternLM2ForCausalLM(InternLM2PreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def get_output_embeddings(self):
        return self.output

    def get_decoder(self):
        return self.model

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ):
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.output(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
