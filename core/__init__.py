"""The engine: contracts, hooks and the step. Imports neither ``quire.plugins`` nor ``quire.server``."""
