"""LoRA: low-rank adapters, many beside one another in a batch."""
