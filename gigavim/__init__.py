"""gigavim: whole-slide and aerial images of any size through one Vision Mamba sequence."""

__version__ = "0.1.0"
