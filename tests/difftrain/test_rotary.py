import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from difftrain.config import Config
from difftrain.model import Transformer
from difftrain.rotary import rotated, rotation, rotation_table

SMALL = Config(n_layer=1, n_head=2, n_embd=16, block_size=12)


def attention_of(**changes):
    torch.manual_seed(0)
    return Transformer(dataclasses.replace(SMALL, **changes), 9).blocks[0].attention


def rotated_halves(heads):
    """RoFormer in the half-split form, for (B, H, T, size)."""
    T, size = heads.shape[-2:]
    angle = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, size, 2) / size))
    a, b = heads.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def plain_attention(attention, h):
    B, T, D = h.shape
    q, k, v = attention.qkv(h).view(B, T, 3, attention.n_head, -1).permute(2, 0, 3, 1, 4)
    scores = rotated_halves(q.float()) @ rotated_halves(k.float()).mT / q.shape[-1] ** 0.5
    out = scores.softmax(-1) @ v.float()
    return attention.proj(out.to(h.dtype).transpose(1, 2).reshape(B, T, D))


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_attention_is_that_of_queries_and_keys_rotated_in_halves(
    dtype, tolerance, is_compiled, monkeypatch
):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiled)
    attention = attention_of(bias=True).to(dtype)
    torch.nn.init.normal_(attention.qkv.bias)
    found, expected = [], []
    for results, function in (
        (found, lambda h: attention(h, rotation(rotation_table(12, 8)[:7], 2))),
        (expected, lambda h: plain_attention(attention, h)),
    ):
        h = torch.linspace(-2, 2, 3 * 7 * 16).sin().view(3, 7, 16).to(dtype).requires_grad_()
        out = function(h)
        inputs = [h, attention.qkv.weight, attention.qkv.bias]
        results += [out, *torch.autograd.grad((out * torch.linspace(-1, 1, 16)).sum(), inputs)]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone():
    attention = attention_of(n_head=1, n_embd=8)
    h = torch.randn(8).expand(1, 20, 8)
    q, k, v = (
        t[:, 0] for t in rotated(h, attention.qkv.weight, None, rotation(rotation_table(20, 8), 1), 1)
    )
    plain_q, plain_k, plain_v = attention.qkv(h)[0].chunk(3, dim=-1)
    torch.testing.assert_close(q[0].norm(dim=-1), plain_q.norm(dim=-1))
    torch.testing.assert_close(v[0], plain_v)
    products = q[0] @ k[0].T
    torch.testing.assert_close(products[5, 3], products[15, 13])
    torch.testing.assert_close(products[0, 0], plain_q[0] @ plain_k[0])
    assert (products[5, 3] - products[5, 4]).abs() > 1e-6


def test_gradients_have_their_inputs_types_under_autocast_and_only_those_wanted_are_made():
    attention = attention_of()
    weight, turns = attention.qkv.weight, rotation(rotation_table(12, 8), 2)
    h = torch.randn(2, 12, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = rotated(h, weight, None, turns, 2)
    assert {t.dtype for t in (q, k, v)} == {torch.bfloat16}
    (q * k * v).sum().backward()
    assert h.grad.dtype == weight.grad.dtype == torch.float32
    expected, weight.grad = weight.grad, None
    weight.requires_grad_(False)
    h.grad = None
    with Names() as names:
        sum(rotated(h, weight, None, turns, 2)).sum().backward()
    assert names.found.count("mm") == 2  # forward, and the gradient of h
    assert weight.grad is None
    assert h.grad is not None
    weight.requires_grad_()
    q, k, v = rotated(h.detach(), weight, None, turns, 2)
    (q * k * v).sum().backward()
    torch.testing.assert_close(weight.grad, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_layer_reads_its_weight_twice_and_what_it_makes_of_tokens_once_forward_and_once_backward():
    attention, turns = attention_of(), rotation(rotation_table(12, 8), 2)
    h = torch.randn(2, 12, 16, requires_grad=True)
    with Names() as names:
        q, k, v = rotated(h, attention.qkv.weight, None, turns, 2)
        torch.autograd.grad((q, k, v), (h, attention.qkv.weight), (q, k, v))
    work = [
        name
        for name in names.found
        if name in {"index_select", "mm", "mul_", "stack", "cat", "copy_", "clone"}
    ]
    assert work == ["index_select", "mm", "mul_", "stack", "mul_", "mm", "mm", "index_select"]
