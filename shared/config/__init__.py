"""The only place that reads configuration files and the environment; one frozen Struct per service."""

from shared.config.load import ConfigError, load_config
from shared.config.services import RouterConfig, SchedulerConfig, WorkerConfig

__all__ = ["ConfigError", "RouterConfig", "SchedulerConfig", "WorkerConfig", "load_config"]
