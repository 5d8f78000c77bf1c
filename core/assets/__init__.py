"""Files that travel with the package: the embedded models and the held-out questions."""
