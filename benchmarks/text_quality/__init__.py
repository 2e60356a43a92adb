"""How good texts are that a model wrote or repaired, by measures that need no reader."""
