"""How families of models write tool calls and reasoning: each a table that the engine in ``core/parsing`` reads."""
