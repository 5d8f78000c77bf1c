"""Sampling: one rule for greedy, random and verified tokens."""
