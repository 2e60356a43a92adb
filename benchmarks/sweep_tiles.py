"""Time the tiles that the model of triton_kernels/tile_model.py holds for the best, on this CUDA GPU.
Takes 8 minutes at most; --minutes sets another end. Writes benchmarks/results/tiles-<gpu>-<date>.json, or
the file that --json names.

    python benchmarks/sweep_tiles.py [--json FILE] [--minutes M] [--vocab-size V ...]

Each tile is checked against fp64 first; one that is wrong is not timed. The file says for each V which tile
was the fastest, and by how much the model's choice is slower.
"""

from __future__ import annotations

import argparse

import torch

import measuring.checkout  # noqa: F401  our packages are this checkout's, installed or not
from measuring.arguments import count, user_path
from measuring.environment import environment
from reporting.result_files import default_path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--json", type=user_path, help="write the table there")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the whole sweep")
    parser.add_argument(
        "--vocab-size", nargs="+", type=count, help="above 4096; all of the table by default"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    from stages.tile_sweep import SIZES, run_sweep

    path = options.json or default_path(environment())
    path = path if options.json else path.with_name(f"tiles-{path.name}")
    record = run_sweep(60 * options.minutes, path, sizes=tuple(options.vocab_size or SIZES))
    print(record["summary"], f"Written to {path}", sep="\n")
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
