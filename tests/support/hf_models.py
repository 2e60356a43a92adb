"""Models of the shape that transformers' have: one in plain torch for every machine, and tiny ones of transformers' own."""

from types import SimpleNamespace

import torch
from torch import nn

V, D, LENGTH = 97, 32, 24
SIZES = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
# What each is for stands beside it; the names are transformers'.
KINDS = {
    "GPT2LMHeadModel": {
        "vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },  # tied
    "LlamaForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": GROUPED | {"head_dim": 8},
    "Gemma2ForCausalLM": GROUPED | {"head_dim": 8, "final_logit_softcapping": 0.5},  # low enough to bend
    "CohereForCausalLM": GROUPED | {"logit_scale": 3.0},
    "GraniteForCausalLM": GROUPED | {"logits_scaling": 4.0},  # a divisor
    "PhiForCausalLM": GROUPED,  # a bias
    "BertForMaskedLM": SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}  # fmt: skip


class Tiny(nn.Module):
    """An encoder with transformers' face, which ``bend`` makes its logits from what the head gives.

    A causal one unless its configuration says otherwise, as transformers' are.
    """

    def __init__(self, vocab_size=V, bias=True, bend=None, seed=0, **config):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(**config)
        self.tokens = nn.Embedding(vocab_size, D)
        self.places = nn.Embedding(LENGTH, D)
        self.mix = nn.Linear(D, D)
        self.head = nn.Linear(D, vocab_size, bias=bias)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        self.bend = bend or (lambda logits: logits)

    def get_input_embeddings(self):
        return self.tokens

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, labels=None):
        assert labels is None, "it has no loss of its own"
        n = input_ids.shape[1]
        hidden = self.tokens(input_ids) + self.places.weight[:n]
        weight = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen = weight[:, None, :].to(hidden.dtype).expand(-1, n, -1)
        if getattr(self.config, "is_causal", True):
            seen = seen.tril()
        mean = seen @ hidden / seen.sum(-1, keepdim=True).clamp(min=1)
        hidden = hidden + torch.tanh(self.mix(mean))
        return {"logits": self.bend(self.head(hidden)), "hidden_states": hidden}


def tiny_of(name, **changes):
    """A model of transformers with random weights large enough that its logits differ, in eval mode."""
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**KINDS.get(name, {}) | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_of(shape=(3, 11), vocab_size=V, seed=0):
    """x and y: a third masked, some wrong, and at the end of the first row labels that do not count."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size - 1, shape, generator=generator)
    chance = torch.rand(shape, generator=generator)
    x = torch.where(
        chance < 0.33, vocab_size - 1, torch.where(chance < 0.5, (tokens + 1) % (vocab_size - 1), tokens)
    )
    y = torch.where((x != tokens) & (x != vocab_size - 1), vocab_size - 1, tokens)
    y[0, -4:] = -100
    return x, y
