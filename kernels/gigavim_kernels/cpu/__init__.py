"""The scan on a CPU: numba kernels that emit vector code. Imported only where numba is present."""

from gigavim_kernels.cpu.ops import causal_conv, selective_scan

__all__ = ["causal_conv", "selective_scan"]
