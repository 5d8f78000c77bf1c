"""The sources of `quire plugins new`: one file a kind, in which names are replaced."""
