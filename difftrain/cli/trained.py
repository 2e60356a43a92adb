"""Options of every command that opens a trained model: which checkpoint, where it computes and in what."""

from __future__ import annotations

import argparse


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The option ``--checkpoint``."""
    parser.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="best, latest or a step [best]"
    )


def add_computing(parser: argparse.ArgumentParser, dtype: str) -> None:
    """The options ``--device`` and ``--dtype``, the latter with a default of the command's own."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    parser.add_argument(
        "--dtype", default=dtype,
        help="what the model computes in: float32, bfloat16, float16, float64, or auto, which is bfloat16 on CUDA that "
        f"has it, else float32 [{dtype}]",
    )  # fmt: skip
