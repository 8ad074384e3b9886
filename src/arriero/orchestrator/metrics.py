"""What does the orchestrator tell Prometheus?  Plain integers, made into text when asked."""

from collections import Counter as Count
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from arriero.orchestrator.core import Orchestrator


class _Reading(Collector):
    """The counts of this moment."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._o = orchestrator

    def collect(self) -> Iterator[Metric]:
        """Yield each family."""
        counters = self._o.counters
        for name, text, value in (
            ("requests", "Requests and tasks taken on.", counters.requests),
            ("failures", "Requests answered with an error.", counters.failures),
            ("cancelled", "Requests whose client left.", counters.cancelled),
            ("retries", "Requests given to another worker, or once more.", counters.retries),
            ("relayed_bytes", "Bytes of answers passed on.", counters.bytes_relayed),
        ):
            yield CounterMetricFamily(f"arriero_orchestrator_{name}", text, value=value)
        for name, text, value in (
            ("requests_in_flight", "Requests with workers now.", self._o.scheduler.requests_in_flight),
            ("tasks_open", "Tasks that are not finished.", len(self._o.tasks)),
            ("workers_provisioning", "Workers being made.", self._o.provisioner.jobs_running),
        ):
            yield GaugeMetricFamily(f"arriero_orchestrator_{name}", text, value=value)
        registry = self._o.registry
        nodes = GaugeMetricFamily("arriero_nodes", "Nodes by state.", labels=["state"])
        for state, number in sorted(Count(str(node.state) for node in registry.nodes()).items()):
            nodes.add_metric([state], number)
        yield nodes
        workers = GaugeMetricFamily("arriero_workers", "Workers by node and state.", labels=["node", "state"])
        places = Count((record.node, str(record.state)) for record in registry.workers)
        for (node, state), number in sorted(places.items()):
            workers.add_metric([node, state], number)
        yield workers
        downloads = GaugeMetricFamily(
            "arriero_downloads",
            "Downloads by node and state; the last ended ones too.",
            labels=["node", "state"],
        )
        counts = Count((node.name, str(download.state)) for node, download in registry.downloads())
        for (name, state), number in sorted(counts.items()):
            downloads.add_metric([name, state], number)
        yield downloads


def exposition(orchestrator: Orchestrator) -> bytes:
    """Return all counters in Prometheus' text form."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Reading(orchestrator))
    return generate_latest(registry)
