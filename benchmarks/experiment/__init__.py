"""The experiment of curriculum.py: what is trained, what is measured of it, and the tables of that."""
