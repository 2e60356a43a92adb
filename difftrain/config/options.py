"""Every option: one frozen dataclass, with each one's meaning, unit and range."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from difftrain.config.schedules import checked_schedules, schedules_text
from difftrain.errors import UserError

TOML_HEADER = "# difftrain: the configuration of a run"  # by which a run's folder is known
# Options that have no meaning where no word is replaced, and where none is masked either.
REPLACING = ("mask_factor", "replace_factor", "replacement", "self_errors", "wrong_target")
CORRUPTING = ("recipe", "mask_level", "span_length", *REPLACING)
LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4e38  # what fp32 holds


def option(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, is_path: bool = False
) -> Any:
    """A field with its default, its meaning with the unit, the range it must lie in, and whether it is a path."""
    metadata = {"help": help, "low": low, "high": high, "is_path": is_path}
    return dataclasses.field(default=default, metadata=metadata)


# The groups of ``--help`` and of the table in docs/options.md, by the first option of each.
GROUPS = {
    "out_dir": "Run",
    "data": "Data",
    "n_layer": "Model",
    "recipe": "Masking",
    "token_weighting": "Loss",
    "max_iters": "Optimisation",
    "eval_interval": "Evaluation, logging, checkpoints",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run. Names are nanoGPT's and the specification's."""

    out_dir: str = option(
        "runs/default", "folder of the run: configuration, metrics, checkpoints, plots", is_path=True
    )
    seed: int = option(
        1337, "seed of initialisation, data order, corruption and dropout", low=0, high=2**63 - 1
    )
    mode: Literal["diffusion", "gpt2"] = option(
        "diffusion", "diffusion: no causal mask, repairs corrupted text; gpt2: causal, next token"
    )
    device: str = option("auto", "auto | cpu | cuda | cuda:N | mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = option(
        "auto",
        "autocast type; auto: bfloat16 on CUDA that has it, else float32; float64: the weights too, to compare runs",
    )
    compile: Literal["off", "model", "step"] = option(
        "off",
        "torch.compile: model, the model alone; step, model, loss and backward pass as one graph (a few under ddp)",
    )
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp",
        "with several processes, ddp: each holds the whole model; fsdp: weights and optimiser are shared out",
    )
    deterministic: bool = option(
        False, "one CPU thread and deterministic algorithms: equal runs give equal bits; slower"
    )

    data: str = option(
        "stdlib",
        "stdlib (the running Python's own source), a text (UTF-8; CRLF is read as LF), or a folder",
        is_path=True,
    )
    block_size: int = option(256, "tokens a sequence", low=1)
    batch_size: int = option(64, "sequences a micro-batch, at most", low=1)
    gradient_accumulation_steps: int = option(
        1,
        "micro-batches a step over all processes together; with fewer than processes, smaller ones",
        low=1,
    )

    n_layer: int = option(6, "transformer blocks", low=1)
    n_head: int = option(6, "attention heads; divides n_embd", low=1)
    n_embd: int = option(384, "width of the residual stream", low=1)
    dropout: float = option(0.0, "share of activations dropped in training", low=0.0, high=0.999)
    bias: bool = option(False, "biases in linear layers and layer norms, as GPT-2 has")
    position: Literal["rotary", "learned"] = option(
        "rotary", "rotary: rotation of queries and keys; learned: nanoGPT's embedding"
    )
    init_from: str = option(
        "", "begin with the weights of a GPT-2 folder, of nanoGPT's ckpt.pt or of a run; see docs/huggingface.md",
        is_path=True,
    )  # fmt: skip
    causal_anneal_iters: int = option(
        0, "steps in which a causal mask goes little by little, for a model that had one; 0: at once", low=0
    )

    recipe: Literal["specification", "llada", "mdlm"] = option(
        "specification",
        "specification: words are masked and replaced, and weighed by the answer, as the options below say; "
        "llada: each is masked with probability p_mask, drawn for its sequence; mdlm: so, and never answered [MASK]",
    )
    penalty_keep_mask: float = option(
        0.25, "final weight where a masked position is answered [MASK]", low=0.0, high=LARGEST_FLOAT
    )
    penalty_mask_correct: float = option(
        0.5, "final weight where a correct word is answered [MASK]", low=0.0, high=LARGEST_FLOAT
    )
    masking_warmup_iters: int = option(
        1000, "steps over which the penalties move from (1, 0) to their final values", low=0
    )
    guaranteed_correct_factor: float = option(
        0.01, "share of each sequence that corruption leaves alone at least", low=0.0, high=0.999
    )

    mask_level: Literal["uniform", "cosine", "antithetic", "stratified"] = option(
        "uniform",
        "how a sequence's share of [MASK] is drawn; uniform; cosine: cos(pi / 2 * u), more masks; antithetic: u and 1 - u "
        "by turns; stratified: one in each of as many parts as a step has sequences. Validation draws them evenly",
    )
    mask_factor: float = option(1.0, "times the share that is masked; 0: nothing is", low=0.0, high=1.0)
    replace_factor: float = option(
        1.0, "times the share that is replaced; 0: nothing is", low=0.0, high=1.0
    )
    span_length: int = option(1, "words that are corrupted together, one after the other", low=1)
    replacement: Literal["uniform", "unigram"] = option(
        "uniform", "wrong words; uniform: any other; unigram: by how often each stands in the training text"
    )
    self_errors: float = option(
        0.0,
        "share of the wrong words that the model itself gives there, at a forward pass a batch",
        low=0.0,
        high=1.0,
    )
    wrong_target: Literal["mask", "token"] = option(
        "mask", "what a wrong word is to be answered with; mask: [MASK]; token: the right word"
    )

    token_weighting: Literal["recipe", "uniform"] = option(
        "recipe", "weight of a masked position under llada and mdlm; recipe: 1 / p_mask; uniform: 1"
    )
    gate: Literal["argmax", "probability"] = option(
        "argmax", "penalties weigh by the answer; probability: they fade in with the probability of [MASK]"
    )
    softcap: float = option(
        0.0,
        "logits become softcap * tanh(logit / softcap), in sampling too; 0: they stay",
        low=0.0,
        high=LARGEST_FLOAT,
    )
    label_smoothing: float = option(
        0.0, "share of the target that is spread over the vocabulary", low=0.0, high=0.999
    )
    z_loss: float = option(
        0.0, "factor of the squared log-sum-exp added at each position", low=0.0, high=LARGEST_FLOAT
    )
    forbid_mask: bool = option(
        False, "[MASK] is never an answer, as if its logit were -inf; always so under mdlm"
    )
    # auto: linear where the logits of a micro-batch would take more than the linear loss's whole
    # workspace (256 MiB) on CUDA: batch_size * block_size * vocab_size * bytes; else logits.
    loss_impl: Literal["auto", "linear", "logits", "reference"] = option(
        "auto",
        "linear: from hidden states, logits never whole; logits: fused where CUDA is; reference: eager; "
        "auto: linear on CUDA where the logits pass 256 MiB, else logits",
    )
    max_iters: int = option(5000, "optimiser steps, exactly; with a budget, at most", low=1)
    budget_minutes: float = option(
        0.0,
        "time a few steps first, and shorten a new run to about this many minutes, its schedules and intervals "
        "with it; 0: off",
        low=0.0,
    )
    min_iters: int = option(1, "steps that a budget leaves at least, however slow the machine", low=1)
    learning_rate: float = option(1e-3, "peak learning rate", low=0.0)
    min_lr: float = option(1e-4, "learning rate at and after lr_decay_iters", low=0.0)
    warmup_iters: int = option(100, "steps of linear learning-rate warmup", low=0)
    lr_decay_iters: int = option(0, "step at which cosine decay ends; 0: max_iters", low=0)
    decay_lr: bool = option(True, "warm up and decay the learning rate; false: constant")
    weight_decay: float = option(0.1, "AdamW decay of matrices; vectors are not decayed", low=0.0)
    beta1: float = option(0.9, "AdamW, first moment", low=0.0, high=0.9999)
    beta2: float = option(0.95, "AdamW, second moment", low=0.0, high=0.999999)
    grad_clip: float = option(1.0, "largest gradient norm; 0: no clipping", low=0.0)
    max_bad_steps: int = option(
        10, "consecutive steps not applied (non-finite loss or gradient, spike) before the run ends", low=1
    )
    spike_factor: float = option(
        0.0, "leave out a step whose gradient norm is this many times the usual one; 0: never", low=0.0
    )
    schedules: str = option(
        "{}",
        "quantities that move by a shape of their own instead, as a table: {NAME = {shape = ...}, ...}; "
        "see docs/schedules.md",
    )

    eval_interval: int = option(500, "steps between evaluations, each followed by a checkpoint", low=1)
    eval_iters: int = option(40, "batches in the fixed validation set, least to most corrupted", low=2)
    eval_batch_size: int = option(64, "sequences a validation batch", low=1)
    log_interval: int = option(10, "steps between log lines", low=1)
    always_save_checkpoint: bool = option(True, "save at every evaluation; false: on improvement only")
    keep_checkpoints: int = option(2, "newest checkpoints kept beside the best one", low=1)
    wandb_log: bool = option(False, "also log to Weights & Biases (extra: wandb)")
    wandb_project: str = option("difftrain", "its project")
    wandb_run_name: str = option("", "its run name; empty: the run folder's name")
    tensorboard: bool = option(False, "also log to TensorBoard in the run folder (extra: tb)")

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", schedules_text(self.schedules))
        for field in dataclasses.fields(self):
            value = _checked_type(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            _check_range(field, value)
        for name in ("out_dir", "data"):
            if not getattr(self, name):
                raise UserError(f"{name} must not be empty")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd must be a multiple of n_head {self.n_head}, got {self.n_embd}")
        if self.position == "rotary" and (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"n_embd / n_head must be even for rotary positions, got {self.n_embd // self.n_head}"
            )
        if self.mask_factor == self.replace_factor == 0:
            raise UserError("mask_factor and replace_factor must not both be 0: nothing would be corrupted")
        unused = {"diffusion": REPLACING if self.recipe != "specification" else (), "gpt2": CORRUPTING}
        for name in unused[self.mode]:
            if (value := getattr(self, name)) != (default := _DEFAULTS[name]):
                where = f"under recipe {self.recipe}, which masks alone"
                where = where if self.mode == "diffusion" else "in gpt2 mode, which corrupts nothing"
                raise UserError(f"{name} must be {default} {where}, got {value}")
        if self.forbid_mask and self.has_penalties:
            raise UserError(
                "forbid_mask must be false with recipe specification, where [MASK] is the answer to a wrong word"
            )
        if self.causal_anneal_iters and (self.mode == "gpt2" or self.compile != "off"):
            raise UserError("causal_anneal_iters must be 0 in gpt2 mode and with compile")
        if self.compile != "off" and self.parallel == "fsdp":
            raise UserError(f"compile must be off with parallel fsdp, got {self.compile}")
        if 0.0 < self.spike_factor <= 1.0:
            raise UserError(f"spike_factor must be 0 or above 1, got {self.spike_factor}")
        if self.min_lr > self.learning_rate and self.decay_lr:
            raise UserError(f"min_lr must be at most learning_rate {self.learning_rate}, got {self.min_lr}")
        moved = self.scheduled  # which is checked here
        if self.compile == "step" and "label_smoothing" in moved:
            raise UserError(
                "schedules must not have label_smoothing with compile step, where it is a constant"
            )

    @functools.cached_property
    def scheduled(self) -> dict[str, dict[str, Any]]:
        """The tables of ``schedules`` by what they move, checked and complete."""
        options = {
            field.name: (getattr(self, field.name), field.metadata["low"], field.metadata["high"])
            for field in dataclasses.fields(self)
        }
        is_causal = self.mode == "gpt2"
        return checked_schedules(
            self.schedules, options, has_penalties=self.has_penalties, is_causal=is_causal
        )

    @property
    def global_batch_size(self) -> int:
        """Sequences an optimiser step, over all processes and micro-batches."""
        return self.batch_size * self.gradient_accumulation_steps

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """Micro-batches that each of ``world_size`` processes takes in a step, and the sequences in each.

        Raises UserError where the step's sequences cannot be shared out evenly.
        """
        micro_steps = -(-self.gradient_accumulation_steps // world_size)
        if self.global_batch_size % (world_size * micro_steps):
            raise UserError(
                f"batch_size * gradient_accumulation_steps must be a multiple of {world_size * micro_steps} "
                f"for {world_size} processes, got {self.batch_size} * {self.gradient_accumulation_steps}"
            )
        return micro_steps, self.global_batch_size // (world_size * micro_steps)

    @property
    def has_penalties(self) -> bool:
        """Whether positions are weighed by the answer; where none has [MASK] for its target, none is."""
        return self.mode == "diffusion" and self.recipe == "specification"

    @property
    def forbids_mask(self) -> bool:
        """Whether [MASK] is never an answer."""
        return self.forbid_mask or self.recipe == "mdlm"

    @property
    def max_corruption(self) -> float:
        """Largest share of a sequence that corruption may touch."""
        return 1.0 - self.guaranteed_correct_factor

    def to_toml(self) -> str:
        """The configuration as a TOML document, every key with its meaning."""
        lines = [TOML_HEADER]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (
                field.name != "schedules"
            ):  # which is TOML; JSON's strings, numbers and booleans are TOML's too
                value = json.dumps(value, ensure_ascii=False)
            lines.append(f"{field.name} = {value}  # {field.metadata['help']}")
        return "\n".join(lines) + "\n"


TYPES = get_type_hints(Config)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}
PATHS = [field.name for field in dataclasses.fields(Config) if field.metadata["is_path"]]


def _checked_type(name: str, value: Any) -> Any:
    """``value`` in the type of option ``name``; a whole number does for a float."""
    expected = TYPES[name]
    if get_origin(expected) is Literal:
        if value not in get_args(expected):
            raise UserError(f"{name} must be one of {', '.join(get_args(expected))}, got {value!r}")
        return value
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(
                f"{name} must be finite, got a whole number of {value.bit_length()} bits"
            ) from None
    if isinstance(value, str) and not value.isprintable():
        raise UserError(f"{name} must be printable text, got {value!r}")
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise UserError(f"{name} must be {expected.__name__}, got {type(value).__name__} {value!r}")
    return value


def _check_range(field: dataclasses.Field[Any], value: Any) -> None:
    low, high = field.metadata["low"], field.metadata["high"]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{field.name} must be finite, got {value}")
    if low is not None and value < low:
        raise UserError(f"{field.name} must be at least {low}, got {value}")
    if high is None and isinstance(value, int):
        high = LARGEST_INT
    if high is not None and value > high:
        raise UserError(f"{field.name} must be at most {high}, got {value}")
