"""What /metrics says, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one server; docs/serve.md lists them."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def metric(kind: type, name: str, text: str, labels: tuple = (), **more):
            return kind(f"blip3o_{name}", text, labels, registry=registry, **more)

        self.waiting = metric(Gauge, "queue_images", "Images that wait.")
        self.ready = metric(Gauge, "ready", "1 once all programs are compiled.")
        self.responses = metric(
            Counter, "responses", "HTTP responses.", ("method", "route", "status")
        )
        self.rejected = metric(Counter, "rejected", "Calls that were refused.", ("reason",))
        self.images = metric(Counter, "images", "Images that were made.", ("kind",))
        seconds = "Seconds of a stage: queue of an image, batch, encode of a call, call."
        self.seconds = metric(Histogram, "seconds", seconds, ("stage",), buckets=SECONDS)
        fill = tuple(n / 8 for n in range(1, 9))
        self.fill = metric(Histogram, "batch_fill", "Part of a batch in use.", buckets=fill)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
