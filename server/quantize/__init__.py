"""``quire quantize``: checkpoints made by quantization tools, and compared with the original."""
