"""Triton kernels for GPUs: the scan forward and backward, the convolution, the norm, the block."""
