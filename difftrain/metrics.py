"""Metrics: the numbers of a case table, and where they go (JSONL, console, trackers)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from difftrain.config import Config, UserError
from difftrain.schedule import masking_penalties
from difftrain_kernels import CaseTable
from difftrain_kernels.cases import ANSWERS, KINDS

FILE = "metrics.jsonl"
INERT_SHARE = 1e-3  # a penalty that weighs fewer answers than this does nothing
DEGENERATE_SHARE = 0.95
RUNAWAY_GAP = 30.0  # nats: softmax gives [MASK] less than 1e-13


def loss_metrics(table: CaseTable, pk: float, pm: float, config: Config) -> dict[str, Any]:
    """The losses and case rates of one table, as they stand in ``metrics.jsonl``.

    Keys: ``loss`` at the penalties (pk, pm), ``loss_final`` at the configured final ones, ``nll``
    with no weights; and unless the mode is gpt2 ``cases``: for each kind of position the share of
    each answer, the mean nll, its sum in each cell, and the mean gap between the largest logit and [MASK]'s.
    """
    metrics: dict[str, Any] = {
        "loss": table.loss_at(pk, pm).item(),
        "loss_final": table.loss_at(*masking_penalties(config.masking_warmup_iters, config)).item(),
        "nll": table.loss_at(1.0, 1.0).item(),
    }
    if config.mode == "diffusion":
        rates, nll, gap = table.rates(), table.mean_nll(), table.mean_gap()
        metrics["cases"] = {
            kind: {
                "n": int(table.counts[k].sum()),
                **{answer: rates[k, a].item() for a, answer in enumerate(ANSWERS)},
                "nll": nll[k].item(),
                "nll_sums": {answer: table.nll[k, a].item() for a, answer in enumerate(ANSWERS)},
                "gap": gap[k].item(),
            }
            for k, kind in enumerate(KINDS)
        }
    return metrics


def console_line(record: dict[str, Any]) -> str:
    """One metrics record as one line of text."""
    parts = [f"step {record['step']:>6}", f"{record['kind']:<5}"]
    names = {"loss": "loss", "loss_final": "final", "nll": "nll"}
    parts += [f"{names[key]} {record[key]:.4f}" for key in names]
    levels = record.get("masked_nll")
    if levels:
        parts.append("masked nll " + " ".join(f"{k}:{_number(v)}" for k, v in levels.items()))
    elif "cases" in record:
        parts.append(f"masked nll {_number(record['cases']['masked']['nll'])}")
    parts += [f"pk {record['pk']:.3f} pm {record['pm']:.3f} lr {record['lr']:.2e}"]
    cases = record.get("cases")
    if cases:
        shares = [(kind, cases[kind]["mask"]) for kind in KINDS if cases[kind]["n"]]
        parts.append("says [MASK] to " + " ".join(f"{kind} {100 * share:.0f}%" for kind, share in shares))
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    parts.append(f"val {record['validation_id']}")
    return " | ".join(parts)


def summary_line(record: dict[str, Any]) -> str:
    """The last line of a run: what was learned about masked positions, beside unigram guessing."""
    text = f"unigram entropy {record['unigram_entropy']:.3f} nats; validation nll "
    levels = record.get("masked_nll")
    if not levels:
        return text + f"{record['nll']:.3f} nats a token"
    shares = ", ".join(f"{_number(nll)} at {level} %" for level, nll in levels.items() if level.isdigit())
    return text + f"on masked positions {shares} masked, {_number(levels['training'])} as in training"


def _number(value: float | None) -> str:
    return "none" if value is None or math.isnan(value) else f"{value:.3f}"


def health_warnings(record: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    """What an evaluation record shows to be wrong with the penalties: (key, message) each."""
    cases = record.get("cases")
    if not cases or record["step"] == 0:
        return []
    masked, intact = cases["masked"], cases["intact"]
    warnings = []
    if record["pk"] != 1.0 and masked["mask"] < INERT_SHARE:
        warnings.append(
            ("pk", "penalty_keep_mask acts on nothing: masked positions are not answered [MASK]")
        )
    if record["pm"] != 1.0 and intact["mask"] < INERT_SHARE:
        warnings.append(
            ("pm", "penalty_mask_correct acts on nothing: correct words are not answered [MASK]")
        )
    if masked["mask"] > DEGENERATE_SHARE and intact["mask"] > DEGENERATE_SHARE:
        warnings.append(("all", "the model answers [MASK] nearly everywhere"))
    if masked["gap"] > RUNAWAY_GAP:
        warnings.append(
            ("gap", f"[MASK]'s logit lies {masked['gap']:.0f} below the maximum on masked positions")
        )
    return warnings


def check_trackers(config: Config) -> None:
    """Raise UserError where a tracker is asked for and not installed."""
    if config.wandb_log:
        _import_extra("wandb", "wandb")
    if config.tensorboard:
        _import_extra("torch.utils.tensorboard", "tb")


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and, where configured, to W&B and TensorBoard.

    A context manager. With ``is_writing`` false (every process but the main one) it does nothing.
    """

    def __init__(self, run_dir: Path, config: Config, *, is_writing: bool):
        self._file = self._wandb = self._tensorboard = None
        if not is_writing:
            return
        if config.wandb_log:
            wandb = _import_extra("wandb", "wandb")
            name = config.wandb_run_name or run_dir.name
            self._wandb = wandb.init(project=config.wandb_project, name=name, dir=run_dir)
        if config.tensorboard:
            module = _import_extra("torch.utils.tensorboard", "tb")
            self._tensorboard = module.SummaryWriter(str(run_dir / "tensorboard"))
        self._file = (run_dir / FILE).open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; ``step`` and ``kind`` are among its keys. Non-finite numbers become null."""
        if self._file is None:
            return
        self._file.write(json.dumps(_finite_or_null(record), allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb or self._tensorboard:
            scalars = dict(_flatten(f"{record['kind']}/", record))
            if self._wandb:
                self._wandb.log(scalars, step=record["step"])
            if self._tensorboard:
                for name, value in scalars.items():
                    self._tensorboard.add_scalar(name, value, record["step"])

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run, oldest first; raises UserError when there are none.

    A line that is no record is passed over: a killed process may have left one unfinished.
    """
    path = run_dir / FILE
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no {FILE}")
    records = _read_records(path)
    if not records:
        raise UserError(f"{path} has no records yet")
    return records


def _read_records(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record:
            records.append(record)
    return records


def drop_records_after(run_dir: Path, step: int, *, is_evaluated: bool) -> None:
    """Forget the records that a run resumed at ``step`` will write again.

    Args:
        run_dir: the run's folder.
        step: steps done; later records go, and so does the training record of this step.
        is_evaluated: whether the evaluation of this step is done and stays.
    """
    path = run_dir / FILE
    if not path.is_file():
        return
    keep = [r for r in _read_records(path) if (r["step"], r["kind"] == "train") < (step, is_evaluated)]
    aside = path.with_name(f".{FILE}")
    try:
        aside.write_text("".join(json.dumps(r) + "\n" for r in keep), encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _import_extra(module: str, extra: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise UserError(f"{module} is not installed: pip install 'difftrain[{extra}]'") from None


def _flatten(prefix: str, value: dict[str, Any]) -> list[tuple[str, float]]:
    pairs = []
    for key, item in value.items():
        if isinstance(item, dict):
            pairs += _flatten(f"{prefix}{key}/", item)
        elif isinstance(item, (int, float)):
            pairs.append((prefix + key, item))
    return pairs


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
