"""The scheduler, which realises what a batching policy plans."""
