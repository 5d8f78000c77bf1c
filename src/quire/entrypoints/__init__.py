"""Names under which vLLM starts its server, for commands of its guides with the word swapped."""
