"""Records as ``metrics.jsonl`` has them, made for a test."""


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
