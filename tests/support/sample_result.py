"""A made-up results document, marked as a sample: times are round multiples of a round bandwidth.

What it holds is true of no device. It has a contender of every outcome on every shape that
bench_loss.py measures.
"""

from bench_loss import LINEAR_SHAPES, LOGITS_SHAPES
from comparison.contenders import CONTENDERS, NO_WEIGHTS
from comparison.entries import FORWARD, MEASURES, OURS, TIMED, Entry, add_rates, bytes_moved

COPY_GB_PER_S = 1000.0
ENVIRONMENT = {
    "device": "sample, no device (H100 in name alone)", "driver": "0.0", "torch": "0.0", "triton": "0.0",
    "commit": "none", "python": "0.0", "date": "2000-01-01T00:00:00+00:00", "command": "none",
}  # fmt: skip
OUTCOMES = {
    "QuACK cross-entropy": "not installed: No module named 'quack'",
    "QuACK, over the logits": "wrong: gradient off by 0.1, allowed 0.001, upstream 0.125",
    "cut-cross-entropy": "out of memory",
    "cut-cross-entropy, unfiltered": "crashed: SIGSEGV",
}


def entries_of(shape, contender, factor):
    """Times of ``factor`` times the limit, or the contender's outcome."""
    blank = {
        "dtype": "bf16",
        "contender": contender.name,
        "family": contender.family,
        "lacks": contender.lacks,
    }
    outcome = OUTCOMES.get(contender.name, TIMED)
    if outcome != TIMED:
        return [Entry(list(shape), **blank, measure="", outcome=outcome)]
    found = []
    for measure in MEASURES:
        with_gradient = measure != FORWARD
        if len(shape) == 2:
            least = bytes_moved(*shape, 2, with_gradient) / COPY_GB_PER_S / 1e6
        else:
            least = shape[0] * shape[1] * shape[2] / 1e10 * (3 if with_gradient else 1)
        entry = Entry(list(shape), **blank, measure=measure, outcome=TIMED, ms=factor * least)
        entry.ms_20, entry.ms_80, entry.samples = 0.99 * entry.ms, 1.01 * entry.ms, 100
        entry.peak_mib, entry.gradients_mib = 1000.0, 400.0 if with_gradient else 0.0
        add_rates(entry, COPY_GB_PER_S, {False: least / (2 if with_gradient else 1), True: least})
        found.append(entry)
    return found


def sample_result():
    """The document; factors are 1.05 for ours and grow from contender to contender."""
    entries = []
    for shape in LOGITS_SHAPES + LINEAR_SHAPES:
        chosen = [c for c in CONTENDERS if c.kind == ("logits" if len(shape) == 2 else "linear")]
        for place, contender in enumerate(chosen):
            factor = (
                1.05 if contender.family == OURS and contender.lacks != NO_WEIGHTS else 1.0 + 0.5 * place
            )
            factor = 1.04 if contender.name.startswith("plain") else factor
            entries += [vars(e) for e in entries_of(shape, contender, factor)]
    loss = {"environment": ENVIRONMENT, "entries": entries, "seconds": {}}
    return {"format": 1, "sample": True, "environment": ENVIRONMENT, "stages": {"loss": loss}}
