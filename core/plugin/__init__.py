"""Hooks, discovery, names and options: how a plugin is found, chosen and loaded."""
