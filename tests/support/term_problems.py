"""Every term of the losses with a value, batches to try them on, and results held against the oracle."""

import itertools

import numpy as np
import torch

import oracle

B, T = 3, 5
# The options of the losses beyond the two penalties, each with a value that shows.
TERMS = {
    "token_weights": {"token_weights": "random"},
    "case_weights": {"case_weights": [[0.25, 1.5, 0.75], [0.5, 1.25, 2.0], [1.75, 1.0, 0.5]]},
    "gate": {"gate": "probability"},
    "softcap": {"softcap": 3.0},
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.05},
    "forbid_mask": {"forbid_mask": True},
    "logit_scale": {"logit_scale": 0.7},
    "shift": {"shift": 2},
    "normalizer": {"normalizer": 7.0},
}
SINGLES = [(name,) for name in TERMS]
PAIRS = list(itertools.combinations(TERMS, 2))
ALL = [tuple(TERMS)]


def batch(vocab_size=7, mask_id=6, dtype=torch.float64, seed=0, device="cpu"):
    """Logits (B, T, V) and labels in which every kind of position, answer and ignored ones occur."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, vocab_size, generator=generator, dtype=torch.float64) * 2
    logits[:, ::2, mask_id] += 3
    y = torch.randint(0, vocab_size - 1, (B, T), generator=generator)
    x = torch.where(torch.rand(B, T, generator=generator) < 0.5, mask_id, y)
    corrupted = torch.rand(B, T, generator=generator) < 0.25
    x = torch.where(corrupted, torch.randint(0, vocab_size - 1, (B, T), generator=generator), x)
    y = torch.where(corrupted & (x != y), mask_id, y)
    y[0, 1] = -1
    return logits.to(device, dtype), y.to(device), x.to(device)


def options_of(names, y, mask_id, seed=0):
    """The options of some terms, and labels on which they are defined."""
    options = {name: value for term in names for name, value in TERMS[term].items()}
    if "token_weights" in options:
        weights = (
            torch.rand(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 - 1
        )
        weights[1] = 0.0
        weights[1, 0] = -2.0
        options["token_weights"] = weights.to(y.device)
    if "case_weights" not in options:
        options |= {"pk": 0.25, "pm": 0.5}
    if "forbid_mask" in options:  # a target [MASK] is no label then
        y = torch.where(y == mask_id, -1, y)
    return options, y


def expected(logits, y, x, mask_id, options):
    """The oracle's result, and what the loss makes of it: (result, loss by reduction, gradient of the sum)."""
    options = dict(options)
    normalizer = options.pop("normalizer", None)
    if options.get("token_weights") is not None:
        options["token_weights"] = options["token_weights"].double().cpu().reshape(-1).numpy()
    n, length = y.numel(), y.shape[-1]
    flat = logits.double().cpu().reshape(n, -1).numpy()
    result = oracle.diffusion_loss(
        flat, y.cpu().reshape(-1), x.cpu().reshape(-1), mask_id, length=length, **options
    )
    return result, normalizer


def check_table(cases, result, n, rtol=1e-12):
    """A case table against the oracle's."""
    assert cases.counts.tolist() == result.counts.tolist()
    close = {"rtol": rtol, "atol": rtol}
    np.testing.assert_allclose(cases.nll.cpu(), result.nll_sums, **close)
    np.testing.assert_allclose(cases.gap.cpu(), result.gap_sums, **close)
    np.testing.assert_allclose(cases.weighted.cpu(), result.weighted_sums, **close)
    smoothing = torch.zeros(3, 3) if cases.smoothing is None else cases.smoothing
    np.testing.assert_allclose(smoothing.cpu(), result.smoothing_sums, **close)
    np.testing.assert_allclose(0.0 if cases.z_loss is None else cases.z_loss.cpu(), result.z_sum, **close)
    assert cases.n_positions == n


def check_rows(rows, result, shape, rtol=1e-12):
    """What is shown of each row against the oracle."""
    for name in ("nll", "lse", "p_mask", "confidence", "entropy"):
        if getattr(rows, name) is not None:
            got = getattr(rows, name)
            assert got.shape == shape
            np.testing.assert_allclose(
                got.cpu().reshape(-1), getattr(result, name), rtol=rtol, atol=rtol, err_msg=name
            )
    assert rows.case.dtype == torch.int8
    assert rows.case.reshape(-1).tolist() == result.case.tolist()
