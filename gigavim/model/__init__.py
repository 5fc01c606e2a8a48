"""Vim: configuration, encoder, head, weights and model cards. Pure torch; no images are read here."""
