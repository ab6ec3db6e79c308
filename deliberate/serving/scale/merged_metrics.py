"""The metrics of several replicas as one page, each series with the replica's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families


class _Merged:
    def __init__(self, pages: Mapping[str, str], counts: Mapping[str, float]) -> None:
        self._pages = pages
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, page in self._pages.items():
            for one in text_string_to_metric_families(page):
                own = families.setdefault(one.name, Metric(one.name, one.documentation, one.type))
                for sample in one.samples:
                    labels = {**sample.labels, "replica": replica}
                    own.add_sample(sample.name, labels, sample.value)
        for name, value in self._counts.items():
            yield GaugeMetricFamily(f"deliberate:front_{name}", "Of the front.", value)
        yield GaugeMetricFamily("deliberate:replicas", "That answer.", len(self._pages))
        yield from families.values()


def merged(pages: Mapping[str, str], counts: Mapping[str, float]) -> str:
    """One page in Prometheus' text form.

    Args:
        pages: by name of the replica.
        counts: of the front, by name.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(pages, counts))  # type: ignore[arg-type]
    return generate_latest(registry).decode()
