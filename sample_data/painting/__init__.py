"""Procedural painters and writers behind `sample_data/make.py`."""
