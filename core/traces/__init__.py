"""Recordings of a running engine: their records, and the recorder that writes them."""
