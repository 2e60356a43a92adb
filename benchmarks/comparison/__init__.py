"""The losses beside their peers: what is compared, on what, and whether each computes what it claims."""
