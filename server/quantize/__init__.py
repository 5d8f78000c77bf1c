"""``quire quantize``: checkpoints made by outside tools, and compared with the original."""
