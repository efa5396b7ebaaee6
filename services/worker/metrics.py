"""What a worker exports: its cache's settings, and what its steps cost. How long they run the scheduler says."""

from collections.abc import Callable, Mapping

from services.worker.plan import StepPlan, StepResult, StepRunner
from services.worker.work import StepCosts, WorkMeter
from shared.telemetry import metrics
from shared.telemetry.exposition import Exposition, Reading
from shared.telemetry.lag import LoopLag


class WorkerMetrics:
    """From the process's start; the cache and the costs are known once the model is loaded."""

    def __init__(self, num_dropped_spans: Callable[[], int] = lambda: 0) -> None:
        self.lag = LoopLag()
        self._cache: dict[tuple[str, ...], int] = {}
        self._tables: dict[tuple[str, ...], int] = {}
        self._work: WorkMeter | None = None
        self._runner: StepRunner | None = None
        self.exposition = Exposition(
            metrics.EXPORTED["worker"],
            {
                metrics.CACHE_CONFIG_INFO.name: self._read_cache,
                metrics.ESTIMATED_FLOPS.name: lambda: self._work.flops if self._work else 0,
                metrics.ESTIMATED_READ_BYTES.name: lambda: self._work.read_bytes if self._work else 0,
                metrics.LATE_COMPILATIONS.name: lambda: self._runner.num_late_compilations if self._runner else 0,
                metrics.PRODUCT_TABLES.name: lambda: self._tables,
                metrics.SPANS_DROPPED.name: num_dropped_spans,
                metrics.LOOP_LAG.name: lambda: self.lag.histogram,
            },
        )

    def describe(
        self, runner: StepRunner, costs: StepCosts, max_num_seqs: int, tables: Mapping[str, int], **cache: object
    ) -> None:
        """The model is loaded. `cache` has a value for each label of cache_config_info, beside max_num_seqs."""
        self._runner, self._work = runner, WorkMeter(costs, max_num_seqs)
        self._tables = {(verdict,): count for verdict, count in tables.items()}
        facts = {"max_num_seqs": max_num_seqs, **cache}
        self._cache = {tuple(str(facts[label]) for label in metrics.CACHE_CONFIG_INFO.labels): 1}

    def on_result(self, plan: StepPlan, result: StepResult) -> None:
        """A step is over; one that failed counts for nothing."""
        if self._work is not None and not result.error:
            self._work.add(plan)

    def _read_cache(self) -> Reading:
        return self._cache
