"""What a finished run left behind, as digests: equal runs have equal ones."""

import hashlib
import json
from pathlib import Path

from difftrain.checkpoints.reading import find_checkpoint
from difftrain.reporting.log import read_metrics

TIMES = ("time", "tokens_per_second", "peak_memory_mib")  # what differs between equal runs


def digests_of(config):
    """SHA-256 of a finished run's weights, optimiser state, bookkeeping and metrics without times."""
    folder = find_checkpoint(Path(config.out_dir), "latest").folder
    assert folder.name == f"step-{config.max_iters:08d}"
    files = ["model.safetensors", "state.json", "optimizer/optimizer.safetensors"]
    digests = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files}
    records = [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(Path(config.out_dir))]
    return digests | {"metrics": hashlib.sha256(json.dumps(records).encode()).hexdigest()}
