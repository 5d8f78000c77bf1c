"""Triton kernels of sampling. Imported on a GPU alone; the torch code beside this folder is the reference."""
