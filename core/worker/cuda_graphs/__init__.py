"""Steps captured as CUDA graphs: how one is captured, those of decodes, those with prompts."""
