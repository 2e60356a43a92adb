"""What becomes of figures: the results file, the goals it is held against, and the picture."""
