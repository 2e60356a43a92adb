"""The report of runs: one HTML page on its own, with pictures that a reader can ask, and the numbers as tables."""
