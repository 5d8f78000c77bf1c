"""No structured output: nothing is read of the tokenizer, and nothing is kept for masks."""

from __future__ import annotations

from quire.sdk import CompiledGrammar, InvalidRequestError, StructuredOutputBackend, StructuredOutputsParams

__all__ = ["NoBackend"]


class NoBackend(StructuredOutputBackend):
    """Refuses every constraint."""

    @classmethod
    def validate_params(cls, params: StructuredOutputsParams) -> None:
        """Refuses it."""
        raise InvalidRequestError(
            "structured output is off on this server; start it with llguidance installed and without "
            "--structured-output-backend none",
            "structured_outputs",
        )

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Refuses it."""
        self.validate_params(params)
        raise NotImplementedError
