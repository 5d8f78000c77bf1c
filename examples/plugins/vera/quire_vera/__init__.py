"""VeRA adapters, as PEFT saves them with ``save_projection=True``."""

from quire.sdk import hookimpl


@hookimpl
def quire_register_adapter(register):
    register("vera", "quire_vera.method:Vera", "VeRA: two vectors a layer, between random matrices that layers share")
