"""The engine: what a sequence will cost, where it lives, and how the encoder sweeps over it."""
