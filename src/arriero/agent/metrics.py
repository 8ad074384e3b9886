"""Which numbers does an agent show to Prometheus?  (`GET /metrics`)"""

from collections import Counter
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from arriero.agent.catalog import ModelCatalog
from arriero.agent.supervisor import Supervisor
from arriero.contracts.records import DownloadRecord, ModelRecord
from arriero.contracts.states import WorkerState
from arriero.domain.download_states import DOWNLOADS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class AgentMetrics(Collector):
    """Reads plain counts when it is scraped: counting costs nothing where it happens."""

    def __init__(self, supervisor: Supervisor, downloads: "Downloads", catalog: ModelCatalog) -> None:
        self._supervisor = supervisor
        self._downloads = downloads
        self._catalog = catalog
        self._models: Sequence[ModelRecord] = ()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    async def page(self) -> bytes:
        """Return the page, the catalog asked for its part."""
        self._models = await self._catalog.records()
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics as they are now."""
        by_state = Counter(record.state for record in self._supervisor.registry)
        workers = GaugeMetricFamily(
            "arriero_agent_workers", "Workers by state; ended ones for ten minutes.", labels=["state"]
        )
        for state in WorkerState:
            workers.add_metric([str(state)], by_state.get(state, 0))
        yield workers
        counts = self._supervisor.counts
        for name, value, help_text in (
            ("spawns", counts.spawns, "Workers started."),
            ("adoptions", counts.adoptions, "Workers taken over from an earlier agent."),
            ("crashes", counts.crashes, "Workers that ended without being asked to, or never became of use."),
            ("kills", counts.kills, "Workers ended by SIGKILL from the agent."),
            ("out_of_memory", counts.out_of_memory, "Workers the kernel killed for memory, with proof."),
            ("stops", counts.stops, "Workers that ended as they were asked to."),
            ("idle_unloads", counts.idle_unloads, "Workers stopped because they had no work."),
        ):
            yield CounterMetricFamily(f"arriero_agent_worker_{name}", help_text, value=value)
        yield from self._of_models()
        downloads = CounterMetricFamily(
            "arriero_agent_downloads", "Downloads by how they ended.", labels=["state"]
        )
        for ended, count in self._downloads.ended.items():
            downloads.add_metric([str(ended)], count)
        yield downloads
        yield GaugeMetricFamily(
            "arriero_agent_downloads_running", "Downloads that run now.", value=self._downloads.running
        )
        for name, value, help_text in (
            (
                "bytes",
                self._downloads.bytes,
                "Bytes of models that came, or were found, while they were watched.",
            ),
            ("retries", self._downloads.retries, "Attempts of downloads that failed and were made again."),
        ):
            yield CounterMetricFamily(f"arriero_agent_download_{name}", help_text, value=value)

    def _of_models(self) -> Iterable[Metric]:
        count = GaugeMetricFamily("arriero_agent_models", "Models in the catalog.", labels=["kind"])
        size = GaugeMetricFamily("arriero_agent_models_bytes", "Bytes of their files.", labels=["kind"])
        for kind, is_external in (("own", False), ("external", True)):
            found = [record for record in self._models if record.is_external is is_external]
            count.add_metric([kind], len(found))
            size.add_metric([kind], sum(record.size_bytes for record in found))
        yield count
        yield size


class Downloads:
    """Counts downloads from their changes."""

    def __init__(self) -> None:
        self.ended = dict.fromkeys(sorted(DOWNLOADS.final), 0)
        self.bytes = 0
        self.retries = 0
        self._open: dict[str, DownloadRecord] = {}

    @property
    def running(self) -> int:
        """How many run now."""
        return len(self._open)

    def changed(self, record: DownloadRecord) -> None:
        """Take a change."""
        before = self._open.get(record.download_id)
        if before is not None:
            self.bytes += max(record.bytes_downloaded - before.bytes_downloaded, 0)
            self.retries += record.retry_reason is not None and before.retry_reason is None
        if record.state not in self.ended:
            self._open[record.download_id] = record
        elif before is not None:
            del self._open[record.download_id]
            self.ended[record.state] += 1
