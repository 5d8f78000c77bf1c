"""Triton kernels of the core's operations. Imported on a GPU alone; the torch twins are the reference."""
