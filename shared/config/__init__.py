"""The only place that reads configuration files and the environment; one frozen Struct per service."""

from shared.config.load import ConfigError, load_config
from shared.config.otel import TracingConfig, tracing_config
from shared.config.services import RouterConfig, SchedulerConfig, UpConfig, WorkerConfig

__all__ = [
    "ConfigError",
    "RouterConfig",
    "SchedulerConfig",
    "TracingConfig",
    "UpConfig",
    "WorkerConfig",
    "load_config",
    "tracing_config",
]
