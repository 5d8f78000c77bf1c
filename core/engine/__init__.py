"""The engine core, its clients and the two fronts, LLM and AsyncLLM."""
