"""A draft proposer: ``--spec-method recall``."""

from quire.sdk import hookimpl


@hookimpl
def quire_register_spec_decode(register):
    register("recall", "quire_recall.proposer:Recall", "what followed the same tokens in any request before")
