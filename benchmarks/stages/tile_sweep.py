"""Which tiles suit this device: the model's best few for each V, checked and then timed.

Checks come first and in several processes, since they compile; what they compile, Triton finds on the disk later.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
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
CHECKED_ROWS = 16  # as are the rows that are timed a multiple of 16, which is compiled apart
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
    chosen = [_candidates(vocab_size, dtype, machine) for vocab_size in sizes] if seconds > 0 else []
    checked = _checked([entry for of_size in chosen for entry in of_size], dtype, device)
    for i, vocab_size in enumerate(sizes):
        left = seconds - (time.monotonic() - began)
        if left <= 0:
            left_out.append(vocab_size)
            continue
        of_size = [entry for entry in checked if entry["vocab_size"] == vocab_size]
        _time_size(of_size, vocab_size, dtype, device, logits, left / (len(sizes) - i), times_of)
        entries += of_size
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


def _candidates(vocab_size: int, dtype: torch.dtype, machine: tile_model.Machine) -> list[dict[str, Any]]:
    """Entries without times, the best by the model first."""
    best = tile_model.tiles_by_merit(vocab_size, dtype.itemsize, machine)[:CANDIDATES]
    return [
        {
            "vocab_size": vocab_size, "rank": rank, "logits": model.logits,
            **asdict(tiles.streamed_tile(model, dtype.itemsize)),
            "second_read_hits": tile_model.second_read_hits(model, vocab_size * dtype.itemsize, machine),
            "ms": {},
        }
        for rank, model in enumerate(best)
    ]  # fmt: skip


def _tile_of(entry: dict[str, Any]) -> tiles.Tile:
    return tiles.Tile(warps=entry["warps"], repeat=entry["repeat"])


def _checked(entries: list[dict[str, Any]], dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    """The entries with what is wrong of each; in the same order."""
    check = partial(_wrong_of, dtype=dtype, device=device)
    processes = min(len(entries), (os.cpu_count() or 1) - 2)
    if device == "cpu" or processes < 2:
        wrong = map(check, entries)
    else:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        with ProcessPoolExecutor(processes, context) as pool:
            wrong = list(pool.map(check, entries))
    return [entry | {"wrong": what} for entry, what in zip(entries, wrong, strict=True)]


def _wrong_of(entry: dict[str, Any], dtype: torch.dtype, device: str) -> str:
    rows, y = _rows(CHECKED_ROWS, entry["vocab_size"], dtype, device)
    return what_is_wrong(rows, y, _tile_of(entry))


def _rows(n: int, vocab_size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(n, vocab_size, dtype=dtype, device=device, generator=generator)
    return rows, torch.randint(0, vocab_size, (n,), device=device, generator=generator)


def _time_size(entries, vocab_size, dtype, device, logits, seconds, times_of) -> None:
    """Fill in the times of the entries of one V that are right."""
    n = max(1, logits // vocab_size // CHECKED_ROWS) * CHECKED_ROWS
    rows, y = _rows(n, vocab_size, dtype, device)
    out = triton_kernels.empty_gradient_like(rows)
    for entry in entries:
        if not entry["wrong"]:
            calls = _calls(rows, y, _tile_of(entry), out)
            budget_ms = 1e3 * seconds / len(entries) / len(calls) / 2  # the other half: warming up
            entry["ms"] = {
                name: quantiles(time_calls([call], budget_ms, times_of))[0] for name, call in calls.items()
            }


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
