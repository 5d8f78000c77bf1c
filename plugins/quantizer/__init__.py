"""Bundled quantizers: tools made for it, each in a process of its own."""
