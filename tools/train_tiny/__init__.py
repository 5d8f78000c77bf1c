"""Training of quire-tiny and its draft model: text in, two complete Hugging Face folders out.

Everything is seeded. ``python -m tools.train_tiny --help`` from the root of the checkout says how.
"""
