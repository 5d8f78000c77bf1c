"""GPT-2, of ``quire.sdk.layers``: learned positions, layer norms, a fused and transposed qkv, a tied head."""

from torch import nn

from quire.sdk import Model
from quire.sdk.layers import (
    Attention,
    AttentionShape,
    collect_weight_loaders,
    make_split_loader,
    make_transposed_loader,
    process_weights_after_loading,
)


class GPT2LMHeadModel(Model):
    """Radford et al., 2019."""

    @classmethod
    def example_config(cls):
        sizes = {"vocab_size": 160, "n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 128}
        return {"model_type": "gpt2", **sizes}

    def __init__(self, config, builder):
        super().__init__()
        size, eps = config.n_embd, config.layer_norm_epsilon
        self.wte = builder.make_embedding("transformer.wte", config.vocab_size, size)
        self.wpe = builder.make_learned_positions("transformer.wpe", config.n_positions, size)
        self.h = nn.ModuleList(Block(config, builder, i, f"transformer.h.{i}") for i in range(config.n_layer))
        self.ln_f = builder.make_layer_norm("transformer.ln_f", size, eps)
        self.lm_head = builder.make_lm_head("lm_head", config.vocab_size, size, self.wte)

    def attention_specs(self):
        return [block.attn.spec for block in self.h]

    def forward(self, input_ids, positions, context):
        x = self.wte(input_ids) + self.wpe(positions)
        for block in self.h:
            x = block(x, positions, context)
        return self.ln_f(x)

    def compute_logits(self, hidden):
        return self.lm_head(hidden)

    def checkpoint_map(self):
        loaders = collect_weight_loaders(self)
        for i in range(len(self.h)):
            name = f"transformer.h.{i}"
            for key in ("weight", "bias"):
                parts = [loaders.pop(f"{name}.attn.{part}.{key}") for part in ("q_proj", "k_proj", "v_proj")]
                loaders[f"{name}.attn.c_attn.{key}"] = make_split_loader(parts)
            for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                weight = f"{name}.{layer}.weight"
                loaders[weight] = make_transposed_loader(loaders[weight])
        return loaders

    def process_weights_after_loading(self):
        return process_weights_after_loading(self)


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, config, builder, index, name):
        super().__init__()
        size, heads, eps = config.n_embd, config.n_head, config.layer_norm_epsilon
        shape = AttentionShape(size, heads, heads, size // heads, qkv_bias=True, o_bias=True)
        self.ln_1 = builder.make_layer_norm(f"{name}.ln_1", size, eps)
        self.attn = Attention(builder, f"{name}.attn", index, shape, out_name="c_proj")
        self.ln_2 = builder.make_layer_norm(f"{name}.ln_2", size, eps)
        parts = {f"{name}.mlp.c_fc": config.n_inner}
        self.c_fc = builder.make_column_parallel_linear(f"{name}.mlp.c_fc", size, parts, bias=True)
        self.c_proj = builder.make_row_parallel_linear(f"{name}.mlp.c_proj", config.n_inner, size, bias=True)

    def forward(self, x, positions, context):
        x = x + self.attn.forward_plain(self.ln_1(x), positions, context)
        y = nn.functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.c_proj(y)
