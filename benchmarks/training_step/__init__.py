"""One training step, by the trainer and by a plain GPT-2 written for comparison, each timed by its parts."""
