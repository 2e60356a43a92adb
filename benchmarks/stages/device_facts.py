"""The device itself: its sizes, what a copy and a matrix product reach on it, and whether a first loss is right."""

from __future__ import annotations

from typing import Any

import torch

from comparison.checks import Judge
from comparison.problems import make_problem
from difftrain_kernels import fused_diffusion_loss
from measuring import device
from measuring.rehearsal import is_rehearsed
from measuring.timing import Call, copy_bandwidth, quantiles, time_calls

SHAPE = (64, 5001)  # streamed rows that begin off a 16-byte boundary
PRODUCT = 8192  # rows and columns of the product's matrices
BUDGET_MS = 200.0
PROPERTIES = (
    "multi_processor_count", "L2_cache_size", "total_memory", "clock_rate", "memory_clock_rate", "memory_bus_width",
    "max_threads_per_multi_processor", "regs_per_multiprocessor", "shared_memory_per_multiprocessor",
)  # fmt: skip


def properties() -> dict[str, Any]:
    """What the device says of itself, as far as this torch passes it on."""
    if is_rehearsed():
        return {}
    found = torch.cuda.get_device_properties()
    known = {name: getattr(found, name) for name in PROPERTIES if hasattr(found, name)}
    return known | {"capability": f"{found.major}.{found.minor}", "cuda": torch.version.cuda}


def product_rate(size: int, budget_ms: float) -> float:
    """FLOP per second of a bf16 product of random matrices."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device.kind()) for _ in range(2))
    out = torch.empty_like(a)
    middle, *_ = quantiles(time_calls([Call(lambda: torch.mm(a, b, out=out))], budget_ms))
    return 2 * size**3 / (middle / 1e3)


def run_facts() -> dict[str, Any]:
    """What every later figure is held against. Not ok where the first loss is wrong."""
    problem = make_problem(*SHAPE, torch.bfloat16, device.kind())
    judge = Judge(problem, (1.0,))
    impl = "auto" if is_rehearsed() else "triton"
    wrong = judge.verdict(lambda p, _: fused_diffusion_loss(*p.inputs, *p.labels, impl=impl)).objection
    copy = copy_bandwidth(1.0 if is_rehearsed() else BUDGET_MS) / 1e9
    product = product_rate(64 if is_rehearsed() else PRODUCT, 1.0 if is_rehearsed() else BUDGET_MS) / 1e12
    return {
        "ok": not wrong,
        "summary": f"copy {copy:,.0f} GB/s, bf16 product {product:,.0f} TFLOP/s; first loss {wrong or 'right'}",
        "properties": properties(),
        "copy_gb_per_s": copy,
        "product_tflop_per_s": product,
    }
