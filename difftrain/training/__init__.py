"""Training: the folder a run claims, what one step does, and the loop over steps."""
