"""Exchange: other programs' checkpoints as runs, and runs as their checkpoints."""
