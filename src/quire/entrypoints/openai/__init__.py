"""``python -m quire.entrypoints.openai.api_server``: the same as ``quire serve``."""
