"""nanoGPT's names of the model's weights."""

from __future__ import annotations

_TOP = {"embedding": "wte", "positions": "wpe", "norm": "ln_f"}
_IN_BLOCK = {
    "norm_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.proj": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"  # one tensor under two names


def nanogpt_name(name: str) -> str:
    """What nanoGPT calls the parameter that :class:`difftrain.model.Transformer` calls ``name``."""
    part, kind = name.rsplit(".", 1)
    if not part.startswith("blocks."):
        return f"transformer.{_TOP[part]}.{kind}"
    _, number, part = part.split(".", 2)
    return f"transformer.h.{number}.{_IN_BLOCK[part]}.{kind}"
