"""Sampling: iterative unmasking. A text starts with [MASK]s, and the model fills them in."""
