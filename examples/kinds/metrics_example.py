"""A metrics exporter: ``--metrics metrics_example:LogRequests``."""

import logging
from collections.abc import Mapping

from quire.sdk import MetricsExporter, RequestStats

logger = logging.getLogger(__name__)


class LogRequests(MetricsExporter):
    """A line in the log for every finished request."""

    def record_engine(self, stats: Mapping[str, float]) -> None:
        pass

    def record_request(self, stats: RequestStats) -> None:
        logger.info("%s finished: %s", self.labels.get("model_name"), stats)

    def record_tokens(self, num_prompt: int, num_generated: int, ttft_s: float | None, itl_s: list[float]) -> None:
        pass
