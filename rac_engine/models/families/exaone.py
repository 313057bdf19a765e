"""EXAONE 3 and Deep: q k v and c_fc_0 c_fc_1, norms before the blocks; transformers runs it as a Llama."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family(
    "exaone",
    "Llama",
    PRE_NORM,
    renames=(
        ("self_attn.o_proj", "attn.attention.out_proj"),
        ("self_attn.", "attn.attention."),
        ("mlp.gate_proj", "mlp.c_fc_0"),
        ("mlp.up_proj", "mlp.c_fc_1"),
        ("mlp.down_proj", "mlp.c_proj"),
        ("input_layernorm", "ln_1"),
        ("post_attention_layernorm", "ln_2"),
    ),
    folder="llama",
    layers="transformer.h.",
    embedding="transformer.wte.weight",
    norm="transformer.ln_f.weight",
)
