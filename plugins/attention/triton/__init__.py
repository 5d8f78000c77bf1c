"""The Triton paged attention backend."""
