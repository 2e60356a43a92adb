"""Which tiles suit this device: the model's best few for each V, checked and then timed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from difftrain_kernels import triton_kernels
from difftrain_kernels.triton_kernels import tile_model, tiles
from measuring.environment import environment
from measuring.timing import Call, quantiles, time_calls

SIZES = (4097, 8192, 16385, 32000, 50257, 50304, 128256, 151936, 262144)
CANDIDATES = 5  # of each V, the best by the model
CHECKED_ROWS = 4
LOGITS = 2**28  # of the rows that are timed: 512 MiB in bf16, more than any L2 holds
DIVISOR = 8.0


def run_sweep(
    seconds: float = 480.0, json_path: Path | None = None, *, sizes: tuple[int, ...] = SIZES, device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16, logits: int = LOGITS,
    times_of: Callable[[list[Call]], list[float]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every candidate of every V: whether it is right, and its times in ms where it is.

    Args:
        seconds: for all. A V whose turn comes too late is listed as left out.
        json_path: where the record goes too, with what it depends on; rewritten after each V.
        sizes, device, dtype, logits: what rows, and how many logits in all.
        times_of: takes the times of calls; by default by events on a CUDA device.
    """
    began = time.monotonic()
    machine = tiles.machine_of(torch.empty(0, dtype=dtype, device=device).device)
    record: dict[str, Any] = {
        "environment": environment(),
        "machine": machine._asdict(),
        "dtype": str(dtype),
    }
    entries: list[dict[str, Any]] = []
    left_out = []
    for i, vocab_size in enumerate(sizes):
        left = seconds - (time.monotonic() - began)
        if left <= 0:
            left_out.append(vocab_size)
            continue
        entries += _sweep_size(
            vocab_size, dtype, device, machine, logits, left / (len(sizes) - i), times_of
        )
        record |= _judged(entries, left_out)
        if json_path:
            json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record |= _judged(entries, left_out)
    if json_path:
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _judged(entries: list[dict[str, Any]], left_out: list[int]) -> dict[str, Any]:
    """What the times say of the model: for each V the fastest tile beside the one that it chose."""
    wrong = [f"V = {e['vocab_size']}, {e['warps']} warps: {e['wrong']}" for e in entries if e["wrong"]]
    table = {}
    for vocab_size in dict.fromkeys(e["vocab_size"] for e in entries):
        timed = [e for e in entries if e["vocab_size"] == vocab_size and e["ms"]]
        if timed:
            best = min(timed, key=_total)
            chosen = next((e for e in timed if e["rank"] == 0), None)
            table[vocab_size] = {
                "warps": best["warps"],
                "logits": best["logits"],
                "model_is_slower_by": round(_total(chosen) / _total(best) - 1, 3) if chosen else None,
            }
    slower = [f"{v}: {t['model_is_slower_by']:.1%}" for v, t in table.items() if t["model_is_slower_by"]]
    summary = f"{len(entries)} tiles, {len(wrong)} wrong; the model's choice is the fastest for {len(table) - len(slower)}"
    summary += f" of {len(table)} V" + (f", slower for V = {', '.join(slower)}" if slower else "")
    summary += f"; no time for V = {', '.join(map(str, left_out))}" if left_out else ""
    return {
        "ok": not wrong and not left_out and bool(table),
        "summary": "; ".join([summary, *wrong]),
        "table": table,
        "entries": entries,
    }


def _total(entry: dict[str, Any]) -> float:
    """Milliseconds of the ways that a training step may take: with the loss, and in backward."""
    return entry["ms"]["loss_and_gradient"] + entry["ms"]["loss"] + entry["ms"]["gradient"]


def _sweep_size(vocab_size, dtype, device, machine, logits, seconds, times_of) -> list[dict[str, Any]]:
    n = max(CHECKED_ROWS, logits // vocab_size)
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(n, vocab_size, dtype=dtype, device=device, generator=generator)
    y = torch.randint(0, vocab_size, (n,), device=device, generator=generator)
    out = triton_kernels.empty_gradient_like(rows)
    best = tile_model.tiles_by_merit(vocab_size, dtype.itemsize, machine)[:CANDIDATES]
    entries = []
    for rank, model in enumerate(best):
        tile = tiles.streamed_tile(model, dtype.itemsize)
        entry = {
            "vocab_size": vocab_size, "rank": rank, "logits": model.logits, **asdict(tile),
            "second_read_hits": tile_model.second_read_hits(model, vocab_size * dtype.itemsize, machine),
            "wrong": what_is_wrong(rows[:CHECKED_ROWS], y[:CHECKED_ROWS], tile), "ms": {},
        }  # fmt: skip
        if not entry["wrong"]:
            calls = _calls(rows, y, tile, out)
            budget_ms = 1e3 * seconds / len(best) / len(calls) / 2  # the other half: compiling, warming up
            entry["ms"] = {
                name: quantiles(time_calls([call], budget_ms, times_of))[0] for name, call in calls.items()
            }
        entries.append(entry)
    return entries


def _calls(rows: Tensor, y: Tensor, tile: tiles.Tile, out: Tensor) -> dict[str, Call]:
    """The three passes with this tile."""
    labelled, upstream = (rows, y, y, 0), torch.ones((), dtype=torch.float32, device=rows.device)
    statistics = triton_kernels.launch_loss(*labelled, tile=tile)
    with_loss = {"upstream": 1.0, "divisor": DIVISOR, "gradient_out": out, "tile": tile}
    return {
        "loss": Call(lambda: triton_kernels.launch_loss(*labelled, tile=tile)),
        "loss_and_gradient": Call(lambda: triton_kernels.launch_loss_and_gradient(*labelled, **with_loss)),
        "gradient": Call(
            lambda: triton_kernels.launch_gradient(
                rows, y, statistics, upstream, divisor=DIVISOR, gradient_out=out, tile=tile
            )
        ),
    }


def what_is_wrong(rows: Tensor, y: Tensor, tile: tiles.Tile) -> str:
    """What a tile gets wrong on a few rows, against fp64 and between its own passes; or nothing."""
    try:
        statistics, gradient = triton_kernels.launch_loss_and_gradient(
            rows, y, y, 0, upstream=1.0, divisor=DIVISOR, tile=tile
        )
        alone = triton_kernels.launch_loss(rows, y, y, 0, tile=tile)
        upstream = torch.ones((), dtype=torch.float32, device=rows.device)
        later = triton_kernels.launch_gradient(rows, y, alone, upstream, divisor=DIVISOR, tile=tile)
    except Exception as error:  # a tile that does not compile or launch is a result
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    exact = rows.double().requires_grad_()
    nll = cross_entropy(exact, y, reduction="none")
    (nll.sum() / DIVISOR).backward()
    if not torch.equal(alone.columns, statistics.columns) or not torch.equal(later, gradient):
        return "its passes leave different bits"
    if not torch.allclose(statistics.column("NLL").double(), nll.detach(), rtol=1e-5, atol=1e-5):
        return f"nll off by {(statistics.column('NLL') - nll.detach()).abs().max().item():.2g}"
    limit = torch.finfo(rows.dtype).eps * exact.grad.abs() + 1e-6
    if ((gradient.double() - exact.grad).abs() > limit).any():
        return f"gradient off by {(gradient.double() - exact.grad).abs().max().item():.2g}"
    return ""
