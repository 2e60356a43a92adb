"""Checkpoints: written aside, verified, renamed into place; read only when complete and unharmed."""
