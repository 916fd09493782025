"""The text encoders of all families."""

from __future__ import annotations

from dataclasses import replace

from .build import Model, transformers


def clip(hidden: int, layers: int, heads: int, held: str | None = None) -> Model:
    """A text model of CLIP, its projection as wide as itself; `held` is the class in pipelines without a projection.

    That class, CLIPTextModel, lost the `text_model.` before its names in transformers 5.6; adapters have it.
    """
    config = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": hidden,
    }
    model = transformers("CLIPTextModelWithProjection", "CLIPTextConfig", **config)
    return replace(model, held=transformers(held, "CLIPTextConfig", **config).make) if held else model


CLIP_L = clip(768, 12, 12, held="CLIPTextModel")
CLIP_L_PROJECTED = clip(768, 12, 12)
CLIP_G = clip(1280, 32, 20)
CLIP_H = replace(clip(1024, 23, 16, held="CLIPTextModel"), lacks=("text_projection.weight",))

T5_XXL = transformers(
    "T5EncoderModel",
    "T5Config",
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_heads=64,
    num_layers=24,
    feed_forward_proj="gated-gelu",
)

LLAMA3_8B = transformers(
    "LlamaForCausalLM",
    "LlamaConfig",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)

GEMMA2_2B = transformers(
    "Gemma2Model",
    "Gemma2Config",
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
)

QWEN25_VL_7B = transformers(
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLConfig",
    text_config={
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    vision_config={"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "out_hidden_size": 3584},
)

QWEN3_4B = transformers(
    "Qwen3Model",
    "Qwen3Config",
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=151936,
)

QWEN3_0_6B = transformers(
    "Qwen3Model",
    "Qwen3Config",
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)

# Paths of matrices that no adapter factors: looked up, not multiplied. Vocabularies differ between releases of one
# language model; T5 counts its distances in a table.
EMBEDDINGS = {
    "embed_tokens",
    "model.embed_tokens",
    "shared",
    "encoder.embed_tokens",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
}
