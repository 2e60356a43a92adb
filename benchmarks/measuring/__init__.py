"""How figures are taken: time and memory, other processes, and what the figures depend on."""
