"""Sampling: from logits to tokens. The argmax of logits plus seeded Gumbel noise, for every kind of request."""
