"""Triton kernels of the proposers."""
