"""Structured output in the engine: constraints are compiled while requests wait, and become masks of tokens."""
