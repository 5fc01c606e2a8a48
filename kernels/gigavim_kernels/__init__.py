"""Selective scan and Vim block kernels: torch and numba. Knows nothing of images."""
