"""A Triton kernel as an attention backend: ``--attention-backend flat``."""

from quire.sdk import hookimpl


@hookimpl
def quire_register_attention(register):
    register("flat", "quire_flat_attention.backend:FlatAttention", "one program a query and head", requires=("triton",))
