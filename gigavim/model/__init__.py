"""Vim: configuration, encoder, head, weights, model cards. Pure torch; no images are read."""
