"""HTTP routes, one module per family: ``router(state) -> APIRouter``."""
