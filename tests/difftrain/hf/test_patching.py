"""A patched model computes the loss of the logits that it does not make, or is refused and left as it was."""

import copy
import importlib.util
import inspect
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from difftrain.errors import UserError
from difftrain.hf import patch, unpatch
from difftrain_kernels import fused_diffusion_loss
from hf_models import KINDS, Tiny, V, batch_of, tiny_of

MASK_ID = V - 1
NEED_TRANSFORMERS = [
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
    ),
    pytest.mark.filterwarnings("ignore"),
]
ALL = ["Tiny", *(pytest.param(name, marks=NEED_TRANSFORMERS) for name in KINDS)]


def model_of(name, **changes):
    return Tiny(**changes) if name == "Tiny" else tiny_of(name, **changes)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_logits(model, x, y, *penalties, **options):
    """The loss from the model's logits, divided by the labels that count."""
    logits = model(input_ids=x)["logits"]
    options = {"ignore_index": -100, "normalizer": (y != -100).sum()} | options
    return fused_diffusion_loss(logits, y, x, MASK_ID, *penalties, **options)


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradients_are_those_of_the_models_logits(name):
    model = patch(model_of(name), MASK_ID, pk=0.25, pm=0.5)
    x, y = batch_of()
    outputs = model(input_ids=x, labels=y)
    assert outputs.get("logits") is None
    wanted = of_logits(model, x, y, 0.25, 0.5)
    torch.testing.assert_close(outputs["loss"], wanted, rtol=1e-6, atol=0)
    ours, theirs = gradients(model, outputs["loss"]), gradients(model, wanted)
    assert ours.keys() == theirs.keys()
    assert any(gradient.any() for gradient in ours.values())
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_later_token_is_seen_with_and_without_padding_and_not_before_or_after(name):
    model = model_of(name)
    x, _ = batch_of((1, 8))
    other = x.clone()
    other[0, 5] = (x[0, 5] + 1) % MASK_ID
    padding = torch.ones_like(x)
    padding[0, -1] = 0

    def is_seen(**mask):
        with torch.no_grad():
            a, b = (model(input_ids=ids, **mask)["logits"] for ids in (x, other))
        return bool((a[0, 0] != b[0, 0]).any())

    before = name == "BertForMaskedLM"
    assert is_seen() is before
    patch(model, MASK_ID)
    assert is_seen()
    assert is_seen(attention_mask=torch.ones_like(x))
    assert is_seen(attention_mask=padding)
    unpatch(model)
    assert is_seen() is is_seen(attention_mask=padding) is before


def test_attention_stays_as_it_is_where_this_is_asked_for():
    model = patch(Tiny(), MASK_ID, bidirectional=False)
    assert vars(model.config) == {}
    x, y = batch_of()
    torch.testing.assert_close(model(input_ids=x, labels=y)["loss"], of_logits(model, x, y))


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.numel())
        return result


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("name", ["Tiny", pytest.param("Qwen3ForCausalLM", marks=NEED_TRANSFORMERS)])
def test_no_tensor_of_all_logits_is_made(name, is_training):
    size, shape, chunk = 2048, (8, 20), 16
    model = patch(model_of(name, vocab_size=size), size - 1, chunk_tokens=chunk).train(is_training)
    x, y = batch_of(shape, vocab_size=size)
    with LargestTensor() as seen, nullcontext() if is_training else torch.no_grad():
        loss = model(input_ids=x, labels=y)["loss"]
        if is_training:
            loss.backward()
    # The head and its gradient, D x V, and a chunk's logits are the largest.
    assert seen.largest <= size * 32 < x.numel() * size
    with LargestTensor() as seen, torch.no_grad():
        model(input_ids=x)
    assert seen.largest >= x.numel() * size


def test_options_hold_for_all_calls_or_for_one():
    model = patch(Tiny(), MASK_ID, pk=0.25, pm=0.5, label_smoothing=0.1)
    x, y = batch_of()
    weights = torch.rand(x.shape)
    found = model(input_ids=x, labels=y, token_weights=weights, pk=0.75)["loss"]
    torch.testing.assert_close(
        found, of_logits(model, x, y, 0.75, 0.5, label_smoothing=0.1, token_weights=weights)
    )
    found = model(input_ids=x, labels=y, normalizer=1.0)["loss"]
    torch.testing.assert_close(
        found, of_logits(model, x, y, 0.25, 0.5, label_smoothing=0.1, normalizer=1.0)
    )
    assert model(input_ids=x, pk=0.3)["logits"].shape == (*x.shape, V)  # which no loss is asked of


def test_labels_that_a_shift_leaves_out_are_not_divided_by():
    model = patch(Tiny(), MASK_ID, shift=2)
    x, y = batch_of()
    wanted = of_logits(model, x, y, shift=2, normalizer=(y[:, 2:] != -100).sum())
    torch.testing.assert_close(model(input_ids=x, labels=y)["loss"], wanted)
    found = patch(Tiny(), MASK_ID)(input_ids=x, labels=y, shift=2)["loss"]
    torch.testing.assert_close(found, wanted)


def test_a_batch_in_which_nothing_counts_has_loss_0():
    model = patch(Tiny(), MASK_ID)
    x, y = batch_of()
    loss = model(input_ids=x, labels=torch.full_like(y, -100))["loss"]
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "name",
    [
        "Tiny",
        *(pytest.param(n, marks=NEED_TRANSFORMERS) for n in ("Gemma2ForCausalLM", "GraniteForCausalLM")),
    ],
)
def test_models_in_other_dtypes_are_taken(name, dtype):
    model = patch(model_of(name).to(dtype), MASK_ID)
    x, y = batch_of()
    loss = model(input_ids=x, labels=y)["loss"]
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss, of_logits(model, x, y).to(loss), rtol=2e-2, atol=0)
    assert all(g.dtype == dtype for g in gradients(model, loss).values())


def test_autocast_computes_the_loss_in_its_dtype():
    model = patch(Tiny(), MASK_ID)
    x, y = batch_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=x, labels=y)["loss"]
        wanted = of_logits(model, x, y)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    assert loss.item() != model(input_ids=x, labels=y)["loss"].item()


# What lies between head and logits ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "bend"),
    [
        ({"final_logit_softcapping": 2.0}, lambda z: 2.0 * torch.tanh(z / 2.0)),
        ({"logit_scale": 0.25}, lambda z: z * 0.25),
        ({"logits_scaling": 8.0}, lambda z: z / 8.0),
        (
            {"logit_scale": 0.25, "final_logit_softcapping": 2.0},
            lambda z: 2.0 * torch.tanh(0.25 * z / 2.0),
        ),
        ({"logit_scale": None}, None),
    ],
)
def test_a_scale_and_a_softcap_that_the_configuration_names_are_applied(config, bend):
    model = patch(Tiny(bend=bend, **config), MASK_ID, pk=0.25, pm=0.5)
    x, y = batch_of()
    torch.testing.assert_close(
        model(input_ids=x, labels=y)["loss"], of_logits(model, x, y, 0.25, 0.5), rtol=1e-6, atol=0
    )


def unchanged(model, config):
    return (
        "forward" not in vars(model)
        and "_difftrain" not in vars(model)
        and vars(model.config) == config
        and "forward" not in vars(model.head)
        and model.training
        and not model.mix.training
    )


class Behind(torch.nn.Module):
    """Adds a parameter to the logits, of whatever value."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.full((V,), value))

    def forward(self, logits):
        return logits + self.value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bend": lambda z: 50 * torch.tanh(z / 50)}, r"Tiny does more .* \(nothing\)"),
        ({"bend": lambda z: z * 1.001}, "Tiny does more"),
        ({"logit_scale": 2.0}, r"Tiny does more .* \(logit_scale 2\)"),  # it does not do what it names
        ({"bend": lambda z: z[..., :-1]}, "Tiny does more"),
        ({"bend": lambda z: z.roll(1, 1)}, "Tiny does more"),
        ({"bend": Behind(0.1)}, "Tiny does more"),
        ({"bend": Behind(0.0)}, "Tiny has trained parameters after its output layer"),
        ({"is_encoder_decoder": True}, "must be a decoder or an encoder"),
    ],
)  # fmt: skip
def test_what_is_not_known_between_head_and_logits_is_refused_and_nothing_patched(changes, said):
    model = Tiny(**changes)
    model.mix.eval()
    before = dict(vars(model.config))
    with pytest.raises(UserError, match=said) as caught:
        patch(model, MASK_ID)
    assert "\n" not in str(caught.value)
    assert unchanged(model, before)


def test_a_scale_of_one_in_a_hundred_is_seen_in_bf16():
    with pytest.raises(UserError, match="Tiny does more"):
        patch(Tiny(bend=lambda z: z * 1.01).bfloat16(), MASK_ID)
    patch(Tiny(bend=lambda z: 3.3 * torch.tanh(z / 3.3), final_logit_softcapping=3.3).bfloat16(), MASK_ID)


class Adapter(torch.nn.Module):
    """What adapters make of a layer; at first they add nothing."""

    def __init__(self, base):
        super().__init__()
        self.base, self.up = base, torch.nn.Linear(32, V, bias=False)
        torch.nn.init.zeros_(self.up.weight)
        self.weight, self.bias, self.out_features = base.weight, base.bias, base.out_features

    def forward(self, hidden):
        return self.base(hidden) + self.up(hidden)


class Quantised(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden).round()


def hooked(model):
    model.head.register_forward_hook(lambda module, inputs, output: output + 1)


def replaced(make):
    def change(model):
        model.head = make(model.head)

    return change


def wrapped(model):
    model.head.forward = model.head.forward


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replaced(Adapter), "must be a plain torch.nn.Linear, got .*Adapter: leave it out of adapters"),
        (replaced(lambda head: Quantised(32, V)), "must be a plain torch.nn.Linear, got .*Quantised"),
        (wrapped, "must be a plain torch.nn.Linear"),
        (hooked, "Tiny does more"),
        (replaced(lambda head: head.to("meta")), "must have its weight, got one on meta"),
        (replaced(lambda head: None), r"get_output_embeddings\(\) gives, got Tiny without"),
    ],
)
def test_a_head_that_is_more_than_a_linear_layer_is_refused_when_patched_and_when_called(change, said):
    model, patched = Tiny(), patch(Tiny(), MASK_ID)
    change(model)
    with pytest.raises(UserError, match=said):
        patch(model, MASK_ID)
    assert "_difftrain" not in vars(model)
    if change is hooked:
        return  # which no call looks for
    change(patched)
    x, y = batch_of()
    with pytest.raises(UserError, match=said):
        patched(input_ids=x, labels=y)


def test_a_model_without_a_head_is_named():
    with pytest.raises(UserError, match=r"get_output_embeddings\(\) gives, got Linear without"):
        patch(torch.nn.Linear(2, 2), 1)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"mc_logits": torch.zeros(1)}, "must have one head, got mc_logits beside logits"),
        ({"aux_loss": torch.zeros(())}, "must add no loss of its own, got aux_loss"),
    ],
)
def test_a_second_head_or_loss_is_refused(extra, said):
    class Double(Tiny):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) | extra

    with pytest.raises(UserError, match=said):
        patch(Double(), MASK_ID)


def test_a_head_that_runs_twice_or_a_tuple_is_refused():
    class Twice(Tiny):
        def forward(self, *args, **kwargs):
            self.head(torch.zeros(1, 4, 32))
            return super().forward(*args, **kwargs)

    class Tuple(Tiny):
        def forward(self, *args, **kwargs):
            return (super().forward(*args, **kwargs)["logits"],)

    with pytest.raises(UserError, match="must run once in a forward pass, got 2 times"):
        patch(Twice(), MASK_ID)
    with pytest.raises(UserError, match="must return a ModelOutput with logits, got tuple"):
        patch(Tuple(), MASK_ID)


def test_what_is_no_model_is_refused():
    with pytest.raises(UserError, match="model must be a torch.nn.Module, got str"):
        patch("gpt2", MASK_ID)


def test_a_model_that_stays_causal_is_refused():
    class Causal(Tiny):
        def forward(self, *args, **kwargs):
            before, self.config.is_causal = self.config.is_causal, True
            outputs = super().forward(*args, **kwargs)
            self.config.is_causal = before
            return outputs

    model = Causal(is_causal=True)
    with pytest.raises(UserError, match="must see later tokens too"):
        patch(model, MASK_ID)
    assert vars(model.config) == {"is_causal": True}


class Mixing(torch.nn.Module):
    """A layer that adds the sum of what a position sees: everything, or itself and what lies before."""

    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal

    def forward(self, hidden_states, scale=1.0):
        n = hidden_states.shape[1]
        seen = torch.ones(n, n, dtype=hidden_states.dtype, device=hidden_states.device)
        return (hidden_states + scale * (seen.tril() if self.is_causal else seen) @ hidden_states,)


class Hybrid(Tiny):
    """Layers of either kind, called by place and by name, and one that mixes no positions."""

    def __init__(self, kinds):
        super().__init__(is_causal=True)
        self.layers = torch.nn.ModuleList(Mixing(is_causal) for is_causal in kinds)
        self.others = torch.nn.ModuleList([torch.nn.Linear(32, 32)])

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.others[0](self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]])
        for i, layer in enumerate(self.layers):
            (hidden,) = layer(hidden, scale=0.5) if i % 2 else layer(hidden_states=hidden, scale=0.5)
        return {"logits": self.head(hidden)}


@pytest.mark.parametrize(
    ("kinds", "said"),
    [([True, False, True], "2 do not: layers.0, layers.2"), ([False, True], "1 do not: layers.1")],
)
def test_layers_that_stay_causal_between_others_are_refused_by_name(kinds, said):
    model = Hybrid(kinds)
    with pytest.raises(UserError, match=f"Hybrid must see later tokens in each layer, but {said}"):
        patch(model, MASK_ID)
    assert not any(layer._forward_hooks for layer in [*model.layers, *model.others])
    patch(model, MASK_ID, bidirectional=False)


def test_layers_that_see_both_sides_are_taken_whatever_lies_between():
    patch(Hybrid([False, False]), MASK_ID)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask_id", "options", "said"),
    [
        (V, {}, rf"mask_id must be in \[0, {V}\), got {V}: model.resize_token_embeddings\({V + 1}\) adds"),
        (-1, {}, "mask_id must be at least 0"),
        (1.5, {}, "mask_id must be a whole number"),
        (1, {"labelsmoothing": 0.1}, "labelsmoothing is no option .* did you mean label_smoothing"),
        (1, {"reduction": "sum"}, "reduction is no option"),
        (1, {"return_rows": True}, "return_rows is no option"),
    ],
)
def test_bad_arguments_are_told_in_one_line(mask_id, options, said):
    model = Tiny()
    with pytest.raises(UserError, match=said) as caught:
        patch(model, mask_id, **options)
    assert "\n" not in str(caught.value)
    assert "_difftrain" not in vars(model)


def test_a_term_of_the_models_own_is_not_asked_for_twice():
    make = {"bend": lambda z: 2.0 * torch.tanh(z / 2.0), "final_logit_softcapping": 2.0}
    with pytest.raises(UserError, match="softcap must be left out: the model has its own, 2"):
        patch(Tiny(**make), MASK_ID, softcap=3.0)
    x, y = batch_of()
    with pytest.raises(UserError, match="softcap must be left out"):
        patch(Tiny(**make), MASK_ID)(input_ids=x, labels=y, softcap=3.0)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (
            lambda x, y: {"input_ids": x, "labels": y[:, :-1]},
            r"labels must have the shape .* \(3, 11\), got \(3, 10\)",
        ),
        (lambda x, y: {"labels": y}, "input_ids must be given beside labels"),
        (lambda x, y: {"input_ids": x, "labels": y, "num_items_in_batch": 3}, "DiffusionLossTrainer"),
        (lambda x, y: {"input_ids": x, "labels": y.clamp(min=-1)}, "y must"),
    ],
)
def test_bad_batches_are_told_in_one_line(inputs, said):
    model = patch(Tiny(), MASK_ID)
    with pytest.raises(ValueError, match=said) as caught:
        model(**inputs(*batch_of()))
    assert "\n" not in str(caught.value)
    assert "forward" not in vars(model.head)


def test_hidden_states_of_some_positions_alone_are_refused():
    class Sparse(Tiny):
        def forward(self, input_ids, attention_mask=None, labels=None):
            return super().forward(input_ids[:, :4], attention_mask)

    model = patch(Sparse(), MASK_ID)
    x, y = batch_of()
    with pytest.raises(UserError, match=r"a hidden state for each of input_ids \(3, 11\), got \(3, 4\)"):
        model(input_ids=x, labels=y)


def test_a_configuration_that_no_longer_says_what_was_patched_is_refused():
    x, y = batch_of()
    model = patch(Tiny(bend=lambda z: 2.0 * torch.tanh(z / 2.0), final_logit_softcapping=2.0), MASK_ID)
    model.config.final_logit_softcapping = None
    with pytest.raises(UserError, match=r"softcap and scale must stay {'softcap': 2.0}, got {}") as caught:
        model(input_ids=x, labels=y)
    assert "\n" not in str(caught.value)


def test_a_shared_configuration_that_another_model_made_causal_again_is_refused():
    first, second = Tiny(), Tiny()
    second.config = first.config
    patch(first, MASK_ID)
    patch(second, MASK_ID)
    unpatch(first)
    x, y = batch_of()
    with pytest.raises(UserError, match="config.is_causal must stay False while the model is patched"):
        second(input_ids=x, labels=y)


def test_options_that_come_with_a_batch_are_in_the_signature():
    names = inspect.signature(patch(Tiny(), MASK_ID).forward).parameters
    assert list(names)[:3] == ["input_ids", "attention_mask", "labels"]
    assert {"token_weights", "normalizer", "case_weights", "pk", "pm"} <= set(names)


@pytest.mark.parametrize("name", ["Tiny", pytest.param("Qwen2ForCausalLM", marks=NEED_TRANSFORMERS)])
def test_a_compiled_model_has_the_same_loss(name):
    model = patch(model_of(name), MASK_ID, pk=0.25, pm=0.5)
    compiled = torch.compile(model, backend="eager")
    for seed in (0, 1):
        x, y = batch_of(seed=seed)
        with torch.no_grad():
            found, wanted = (m(input_ids=x, labels=y)["loss"] for m in (compiled, model))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_a_model_is_patched_once_and_can_be_freed():
    model = Tiny(is_causal=True, use_cache=True)
    with pytest.raises(UserError, match="must be patched, got Tiny which is not"):
        unpatch(model)
    patch(model, MASK_ID)
    with pytest.raises(UserError, match=r"Tiny is patched already: difftrain.hf.unpatch\(model\) first"):
        patch(model, MASK_ID)
    before = set(vars(Tiny()))
    assert unpatch(model) is model
    assert set(vars(model)) == before
    assert vars(model.config) == {"is_causal": True, "use_cache": True}
    patch(model, MASK_ID)


def test_inputs_by_place_are_taken():
    model = patch(Tiny(), MASK_ID)
    x, y = batch_of()
    torch.testing.assert_close(model(x, None, y)["loss"], model(input_ids=x, labels=y)["loss"])
    assert model(x)["logits"].shape == (*x.shape, V)


def test_a_copy_computes_with_its_own_weights_and_is_not_pickled():
    model = patch(Tiny(), MASK_ID)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.weight.zero_()
    x, y = batch_of()
    torch.testing.assert_close(twin(input_ids=x, labels=y)["loss"], of_logits(twin, x, y))
    assert model(input_ids=x, labels=y)["loss"] != twin(input_ids=x, labels=y)["loss"]
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.loads(pickle.dumps(patch(Tiny(bend=torch.nn.Identity()), MASK_ID)))


# transformers' own --------------------------------------------------------------------------------


class TestTransformers:
    pytestmark = NEED_TRANSFORMERS

    def test_two_heads_are_refused(self):
        with pytest.raises(UserError, match="must have one head, got mc_logits beside logits"):
            patch(tiny_of("GPT2DoubleHeadsModel", **KINDS["GPT2LMHeadModel"]), MASK_ID)

    def test_a_recurrent_model_is_refused(self):
        model = tiny_of("MambaForCausalLM", vocab_size=V, hidden_size=32, num_hidden_layers=2)
        with pytest.raises(UserError, match="MambaForCausalLM must see later tokens too"):
            patch(model, MASK_ID)

    def test_chunked_layers_that_stay_causal_with_padding_are_refused(self):
        sizes = KINDS["LlamaForCausalLM"] | {"num_hidden_layers": 4, "head_dim": 8, "num_local_experts": 2}
        model = tiny_of("Llama4ForCausalLM", **sizes, intermediate_size_mlp=48)
        with pytest.raises(UserError, match="in each layer, but 3 do not: model.layers.0, model.layers.1"):
            patch(model, MASK_ID)

    def test_a_router_loss_is_refused(self):
        model = tiny_of(
            "MixtralForCausalLM",
            **KINDS["LlamaForCausalLM"],
            num_local_experts=2,
            output_router_logits=True,
        )
        with pytest.raises(UserError, match="must add no loss of its own, got aux_loss"):
            patch(model, MASK_ID)
        model.config.output_router_logits = False
        patch(model, MASK_ID)

    @pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
    def test_a_mask_row_is_added_by_resizing_before_and_after(self, name):
        model = tiny_of(name)
        with pytest.raises(UserError, match=rf"resize_token_embeddings\({V + 1}\)"):
            patch(model, V)
        model.resize_token_embeddings(V + 1)
        patch(model, V)
        model.resize_token_embeddings(V + 8)
        x, y = batch_of(vocab_size=V + 1)
        found = model(input_ids=x, labels=y).loss
        wanted = fused_diffusion_loss(
            model(input_ids=x).logits, y, x, V, ignore_index=-100, normalizer=(y != -100).sum()
        )
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)

    def test_what_is_saved_sees_both_sides_and_is_patched_anew(self, tmp_path):
        import transformers

        model = patch(tiny_of("Qwen2ForCausalLM"), MASK_ID)
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(again) is type(model)
        x, y = batch_of()
        torch.testing.assert_close(again(input_ids=x).logits, model(input_ids=x).logits)
        torch.testing.assert_close(
            patch(again, MASK_ID)(input_ids=x, labels=y).loss, model(input_ids=x, labels=y).loss
        )

    @pytest.mark.parametrize("is_outside", [True, False], ids=["patched outside", "patched inside"])
    def test_adapters_elsewhere_and_a_head_trained_whole_work_and_on_the_head_are_refused(self, is_outside):
        peft = pytest.importorskip("peft")
        inner = tiny_of("Qwen2ForCausalLM", tie_word_embeddings=False)
        lora = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": False}
        if not is_outside:
            patch(inner, MASK_ID)
        model = peft.get_peft_model(inner, peft.LoraConfig(**lora, modules_to_save=["lm_head"]))
        if is_outside:
            patch(model, MASK_ID)
        with torch.no_grad():
            inner.lm_head.modules_to_save["default"].weight.mul_(2.0)
        x, y = batch_of()
        loss = model(input_ids=x, labels=y).loss
        torch.testing.assert_close(loss, of_logits(model, x, y), rtol=1e-6, atol=0)
        assert "base_model.model.lm_head.modules_to_save.default.weight" in gradients(model, loss)

        inner = tiny_of("Qwen2ForCausalLM")
        model = peft.get_peft_model(inner, peft.LoraConfig(**lora | {"target_modules": ["lm_head"]}))
        with pytest.raises(UserError, match="must be a plain torch.nn.Linear, got peft.*Linear"):
            patch(model, MASK_ID)
