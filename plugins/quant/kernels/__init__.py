"""Kernels of quantized linear layers."""
