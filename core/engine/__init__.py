"""The engine core, its client, and the two classes that users call: LLM and AsyncLLM."""
