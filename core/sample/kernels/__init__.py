"""Triton kernels of sampling. Imported on a GPU alone; the torch functions beside this folder are the reference."""
