"""A difftrain model for transformers; ``difftrain export hf`` puts a copy of this file beside the weights.

The copy needs torch and transformers alone: ``difftrain_model.py`` and ``difftrain_rotary.py`` beside it are difftrain's own model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from difftrain.model import Transformer
from difftrain.rotary import rotation_table


class DifftrainConfig(PretrainedConfig):
    """What the model is made of, and under ``difftrain`` the run that it comes from."""

    model_type = "difftrain"
    attribute_map: ClassVar = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size",
    }

    def __init__(
        self,
        vocab_size: int = 2,
        n_layer: int = 1,
        n_head: int = 1,
        n_embd: int = 2,
        block_size: int = 1,
        bias: bool = False,
        dropout: float = 0.0,
        position: str = "learned",
        softcap: float = 0.0,
        forbid_mask: bool = False,
        mask_token_id: int = 1,
        difftrain: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.vocab_size, self.block_size = vocab_size, block_size
        self.n_layer, self.n_head, self.n_embd = n_layer, n_head, n_embd
        self.bias, self.dropout, self.position = bias, dropout, position
        self.softcap, self.forbid_mask, self.mask_token_id = softcap, forbid_mask, mask_token_id
        self.mode = "diffusion"
        self.difftrain = difftrain or {}
        kwargs["tie_word_embeddings"] = True
        super().__init__(**kwargs)


class DifftrainForMaskedLM(PreTrainedModel):
    """Ids to logits of every word, as difftrain's loss saw them in training."""

    config_class = DifftrainConfig
    base_model_prefix = "transformer"
    _tied_weights_keys: ClassVar = {"transformer.head.weight": "transformer.embedding.weight"}
    _supports_sdpa = True

    def __init__(self, config: DifftrainConfig):
        super().__init__(config)
        where = torch.get_default_device()
        self.transformer = Transformer(config, config.vocab_size, device=where)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Transformer) and module.rotation is not None:  # which no file holds
            device = module.embedding.weight.device
            head_size = self.config.n_embd // self.config.n_head
            module.rotation = rotation_table(self.config.block_size, head_size, device)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Logits (B, T, V) in fp32 of ids (B, T), T <= block_size; the loss is the mean over labels other than -100.

        The model knows no padding: an attention mask must be all ones.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "attention_mask must be all ones, got zeros: the model knows no padding; give texts of one length"
            )
        logits = self.transformer(input_ids)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.softcap:
            logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        if self.config.forbid_mask:
            column = torch.arange(logits.shape[-1], dtype=torch.int64, device=logits.device)
            logits = logits.masked_fill(column == self.config.mask_token_id, -torch.inf)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten().to(logits.device))
        return MaskedLMOutput(loss=loss, logits=logits)
