"""Names of vLLM's for what serves LoRA adapters."""
