"""Records as ``metrics.jsonl`` has them, and folders of runs, made for a test."""

import json
import math

from difftrain.config import Config


def record(step, kind="eval", masked=0.1, intact=0.1, gap=1.0, **changes):
    row = {"n": 10, "target": 0.5, "other": 0.4, "nll": 1.0}
    base = {
        "kind": kind, "step": step, "loss": 1.25, "loss_final": 1.5, "nll": 2.0, "pk": 0.5, "pm": 0.25, "lr": 1e-3,
        "validation_id": "abc", "unigram_entropy": 3.25,
        "masked_nll": {"15": 2.1, "50": 2.4, "85": 2.8, "training": 2.9},
        "cases": {
            "masked": row | {"mask": masked, "gap": gap},
            "intact": row | {"mask": intact, "gap": 1.0},
            "corrupted": row | {"mask": 0.9, "gap": 0.0},
        },
    }  # fmt: skip
    return base | changes


def made_record(kind, step, steps, *, seed=0):
    """A record of a run that learns as runs do: [MASK] everywhere first, then words; noisy where it trains."""
    noise = 0.0 if kind == "eval" else 0.05 * math.sin(12.9898 * (step + seed))
    done = step / steps
    level = {
        "15": 3.2 - 1.1 * done,
        "50": 3.3 - 0.7 * done,
        "85": 3.4 - 0.3 * done,
        "training": 3.3 - 0.8 * done,
    }
    says = math.exp(-4 * done)  # share of [MASK] among the answers

    def row(n, mask, target, nll, gap):
        other = 1 - mask - target
        return {"n": n, "mask": mask, "target": target, "other": other, "nll": nll + noise, "gap": gap}

    masked, intact = 0.9 * says, 0.7 * math.exp(-9 * done)
    made = {
        "kind": kind, "step": step, "loss": 2.5 - 1.9 * done + noise, "loss_final": 2.2 - 1.5 * done + noise,
        "nll": 2.8 - 1.8 * done + noise,
        "cases": {
            "masked": row(500, masked, (1 - masked) * (0.2 + 0.3 * done), level["training"], 5 * done),
            "intact": row(1200, intact, (1 - intact) * 0.98, 1.5 - 1.4 * done, 12 * done),
            "corrupted": row(300, 0.3 + 0.4 * done, 0.0, 1.2 - 0.6 * done, 2 * done),
        },
        "pk": 1 - 0.75 * min(1, 2 * done), "pm": 0.5 * min(1, 2 * done), "lr": 3e-3 * (1 - 0.9 * done),
        "validation_id": "0123456789ab", "time": 1.8e9 + 0.25 * step,
    }  # fmt: skip
    if kind == "eval":
        return made | {"unigram_entropy": 3.253, "masked_nll": level}
    return made | {
        "grad_norm": 0.5 + 4 * noise**2, "tokens_per_second": 11_000 + 4000 * noise, "peak_memory_mib": 812.0,
        "skipped_steps": 0,
    }  # fmt: skip


def make_run(folder, steps=40, *, log_interval=1, eval_interval=10, until=None, seed=0, **options):
    """A run's folder with such records up to a step (by default all); ``options`` differ from the defaults."""
    folder.mkdir(parents=True)
    config = Config(
        max_iters=steps,
        log_interval=log_interval,
        eval_interval=eval_interval,
        out_dir=str(folder),
        **options,
    )
    (folder / "config.toml").write_text(config.to_toml())
    until = steps if until is None else until
    lines = []
    for step in range(until + 1):
        if step % eval_interval == 0 or step == steps:
            lines.append(made_record("eval", step, steps, seed=seed))
        if step % log_interval == 0 and step < until:
            lines.append(made_record("train", step, steps, seed=seed))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {
        "event": "start",
        "step": 0,
        "device": "cpu: a processor, 2 cores",
        "torch": "2.13.0",
        "time": 1.8e9,
    }
    (folder / "sessions.jsonl").write_text(
        json.dumps(start | {"data": {"train.bin": "ab12", "val.bin": "cd34"}}) + "\n"
    )
    return folder
