"""What Prometheus would read from a service's /metrics."""

import urllib.error
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from shared.telemetry.metrics import PREFIX


@dataclass
class Scrape:
    """One reading. Names are without the prefix; counters are named with their `_total`."""

    kinds: dict[str, str]
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    def __call__(self, name: str, **labels: str) -> float:
        return self.values[name, tuple(sorted(labels.items()))]

    def labels(self, name: str, label: str) -> dict[str, float]:
        """Value by label value."""
        found = {dict(labels).get(label): value for (each, labels), value in self.values.items() if each == name}
        return {str(key): value for key, value in found.items() if key is not None}

    def buckets(self, name: str) -> dict[float, float]:
        """Upper bound → observations up to it."""
        return {float(bound): value for bound, value in self.labels(name + "_bucket", "le").items()}


def parse(text: str) -> Scrape:
    """Raises AssertionError for a metric that is not ours."""
    kinds, values = {}, {}
    for family in text_string_to_metric_families(text):
        assert family.name.startswith(PREFIX), family.name
        name = family.name.removeprefix(PREFIX)
        kinds[f"{name}_total" if family.type == "counter" else name] = family.type
        for sample in family.samples:
            values[sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))] = sample.value
    return Scrape(kinds, values)


def fetch(address: str, path: str = "/metrics") -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scrape(address: str) -> Scrape:
    status, text = fetch(address)
    assert status == 200, text
    return parse(text)
