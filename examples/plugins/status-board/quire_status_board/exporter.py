from quire.sdk import MetricsExporter


class BoardExporter(MetricsExporter):
    """The longest answer so far, in tokens: for the page, and for Prometheus."""

    def __init__(self, labels, options=None):
        super().__init__(labels, options)
        self.longest = 0

    def record_engine(self, stats):
        pass

    def record_request(self, stats):
        self.longest = max(self.longest, stats.num_generation_tokens)

    def record_tokens(self, num_prompt, num_generated, ttft_s, itl_s):
        pass

    def render(self):
        labels = ",".join(f'{name}="{value}"' for name, value in self.labels.items())
        text = f"# TYPE board_longest_answer gauge\nboard_longest_answer{{{labels}}} {self.longest}\n"
        return "text/plain; version=1.0.0; charset=utf-8", text.encode()
