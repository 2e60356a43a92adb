"""patch(model, mask_id): with labels, a model of transformers computes our loss from its hidden states."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

from difftrain.errors import UserError, near_matches, whole_number
from difftrain.hf.head import (
    check_faithful,
    checked_outputs,
    head_of,
    in_place_of,
    terms_of,
    text_config,
    whole_weight,
)
from difftrain_kernels import fused_linear_diffusion_loss

# What the patched model gives the loss itself, and what would make more of it than a number.
OURS = {
    "hidden", "weight", "bias", "y", "x", "mask_id", "ignore_index", "reduction", "return_cases", "return_rows",
    "entropy",
}  # fmt: skip
OPTIONS = [name for name in inspect.signature(fused_linear_diffusion_loss).parameters if name not in OURS]
NAME = "_difftrain"

M = TypeVar("M", bound=nn.Module)


@dataclass
class Patched:
    """What a patched model remembers."""

    mask_id: int
    ignore_index: int
    options: dict[str, Any]
    terms: dict[str, float]
    before: dict[str, Any]  # of the model's own attributes
    config_before: dict[str, Any] = field(default_factory=dict)

    def count(self, labels: Tensor, given: dict[str, Any] | None = None) -> Tensor:
        """How many labels count, a 0-d int64 tensor."""
        shift = (self.options | (given or {})).get("shift", 0)
        return labels[..., shift:].ne(self.ignore_index).sum()

    def loss(self, head: nn.Linear, hidden: Tensor, x: Tensor, y: Tensor, given: dict[str, Any]) -> Tensor:
        if hidden.shape[:-1] != x.shape:
            raise UserError(
                f"the output layer must see a hidden state for each of input_ids {tuple(x.shape)}, "
                f"got {tuple(hidden.shape[:-1])}"
            )
        options = {"check_labels": y.device.type == "cpu"} | self.options | given
        if options.get("normalizer") is None:
            options["normalizer"] = self.count(y, given)
        return fused_linear_diffusion_loss(
            hidden, whole_weight(head), y, x, self.mask_id, bias=head.bias, ignore_index=self.ignore_index,
            **self.terms, **options,
        )  # fmt: skip


def patch(
    model: M, mask_id: int, *, ignore_index: int = -100, bidirectional: bool = True, **options: Any
) -> M:
    """Make a model's forward pass with labels compute the masked-diffusion loss, from hidden states.

    ``model(input_ids=x, labels=y)`` then runs the model's own forward pass, in which the output layer
    gives the loss in place of logits: no (B, T, V) tensor is made, in training or evaluation. It returns
    the model's own output class with ``loss`` and without ``logits``. Labels are not shifted: y at a
    position is the answer at that position. Without labels the model returns logits as before.

    The loss is the sum over positions divided by ``normalizer``; by default by the number of labels that
    count. Any option may also come with a batch, beside ``labels``, and then holds for this call.

    What the model does to its logits is looked for by running it on four tokens: softcap, scale and bias
    are applied. Anything else, a second head, an adapter or quantisation on the head, is refused.

    Args:
        model: any model of transformers whose ``get_output_embeddings()`` is a torch.nn.Linear; changed in
            place. Wrap and shard it afterwards.
        mask_id: id of [MASK], in [0, V). Where the model has none:
            ``model.resize_token_embeddings(V + 1)`` adds a row, with the id V.
        ignore_index: the label of positions that do not count.
        bidirectional: let every position see later ones too, with and without labels: ``config.is_causal``
            becomes False and ``config.use_cache`` too, also in what ``save_pretrained`` writes.
        options: of :func:`difftrain.fused_linear_diffusion_loss` by name, such as ``pk``, ``pm``,
            ``label_smoothing``, ``gate``.

    Returns:
        The model.

    Raises:
        UserError: a model that cannot be patched faithfully, which stays as it was; a bad argument.
            In a call: labels of another shape, no ``input_ids``, a head that has become something else.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if NAME in vars(model):
        raise UserError(f"{type(model).__name__} is patched already: difftrain.hf.unpatch(model) first")
    config = text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model must be a decoder or an encoder, got both in {type(model).__name__}")
    head, terms = head_of(model), terms_of(model)
    _check_options(options, terms)
    mask_id = _checked_mask_id(mask_id, model, head)
    both = {"is_causal": False, "use_cache": False} if bidirectional and config is not None else {}
    before = {name: getattr(config, name) for name in both if hasattr(config, name)}
    for name, value in both.items():
        setattr(config, name, value)
    try:
        check_faithful(model, head, terms, bidirectional)
    except BaseException:
        _restore(config, both, before)
        raise
    own = {name: vars(model)[name] for name in ("forward", "accepts_loss_kwargs") if name in vars(model)}
    patched = Patched(mask_id, ignore_index, options, terms, own, {"both": both, "before": before})
    setattr(model, NAME, patched)
    # The Trainer counts labels as if they were shifted: its number is not wanted.
    model.accepts_loss_kwargs = False
    model.forward = MethodType(_forward_like(model.forward), model)
    return model


def unpatch(model: M) -> M:
    """Give a patched model its own forward pass and its own attention back; returns it."""
    patched = vars(model).get(NAME)
    if patched is None:
        raise UserError(f"model must be patched, got {type(model).__name__} which is not")
    for name in ("forward", "accepts_loss_kwargs", NAME):
        delattr(model, name)
    for name, value in patched.before.items():
        setattr(model, name, value)
    _restore(text_config(model), **patched.config_before)
    return model


def _restore(config: Any, both: dict[str, Any], before: dict[str, Any]) -> None:
    for name in both:
        if name in before:
            setattr(config, name, before[name])
        else:
            delattr(config, name)


def _check_options(options: dict[str, Any], terms: dict[str, float]) -> None:
    for name in options:
        if name not in OPTIONS:
            raise UserError(
                f"{name} is no option that patch passes on{near_matches(name, OPTIONS) or ': ' + ', '.join(OPTIONS)}"
            )
        if name in terms:
            raise UserError(f"{name} must be left out: the model has its own, {terms[name]:g}")


def _check_configuration(model: nn.Module, patched: Patched) -> None:
    """That nobody has changed what the patch read and wrote; another model may share the configuration."""
    terms = terms_of(model)
    if terms != patched.terms:
        raise UserError(
            f"the configuration's softcap and scale must stay {patched.terms}, got {terms}: "
            "difftrain.hf.unpatch(model) and patch anew"
        )
    if patched.config_before["both"] and getattr(text_config(model), "is_causal", None) is not False:
        raise UserError(
            "config.is_causal must stay False while the model is patched, got "
            f"{getattr(text_config(model), 'is_causal', None)}: models that share a config change it for each other"
        )


def _checked_mask_id(mask_id: int, model: nn.Module, head: nn.Linear) -> int:
    """mask_id as an int with a row in both tables."""
    mask_id = whole_number("mask_id", mask_id, 0)
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    sizes = [head.out_features] + [embedding.num_embeddings] * isinstance(embedding, nn.Embedding)
    if mask_id >= min(sizes):
        raise UserError(
            f"mask_id must be in [0, {min(sizes)}), got {mask_id}: model.resize_token_embeddings({mask_id + 1}) "
            "adds the row"
        )
    return mask_id


def _forward_like(forward: Any) -> Any:
    """A function of the model, with the signature of ``forward``, from which the Trainer reads its columns."""

    def patched_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        patched: Patched = vars(self)[NAME]
        own = patched.before.get("forward") or functools.partial(type(self).forward, self)
        return _run(self, patched, own, args, kwargs)

    signature = inspect.signature(forward)  # of a bound method
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    own = list(signature.parameters.values())
    rest = [p for p in own if p.kind is inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in OPTIONS
        if name not in signature.parameters
    ]
    patched_forward.__signature__ = signature.replace(
        parameters=[first, *own[: len(own) - len(rest)], *options, *rest]
    )
    patched_forward.__doc__ = forward.__doc__
    return patched_forward


def _run(model: nn.Module, patched: Patched, own: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    places = [
        p.name for p in inspect.signature(own).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    kwargs = dict(zip(places, args, strict=False)) | kwargs
    given = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    labels = kwargs.pop("labels", None)
    if labels is None:
        return own(*args[len(places) :], **kwargs)
    x = kwargs.get("input_ids")
    if kwargs.pop("num_items_in_batch", None) is not None:
        raise UserError("num_items_in_batch counts shifted labels: take difftrain.hf.DiffusionLossTrainer")
    if x is None:
        raise UserError("input_ids must be given beside labels: the loss reads what each position was")
    if labels.shape != x.shape:
        raise UserError(
            f"labels must have the shape of input_ids {tuple(x.shape)}, got {tuple(labels.shape)}"
        )
    _check_options(given, patched.terms)
    _check_configuration(model, patched)
    head, losses = head_of(model), []

    def compute(hidden: Tensor) -> Tensor:
        losses.append(patched.loss(head, hidden, x, labels, given))
        return hidden.new_empty(*hidden.shape[:-1], 0)

    with in_place_of(head, compute):
        outputs = checked_outputs(own(**kwargs), len(losses))
    return type(outputs)(**{**outputs, "loss": losses[0], "logits": None})
