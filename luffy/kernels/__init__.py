"""Kernels in Triton, each beside the torch reference that it is tested against."""
