"""``quire plugins bench``: one plugin beside every other of its kind."""
