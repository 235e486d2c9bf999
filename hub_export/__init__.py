"""Published HealthGPT files -> one merged checkpoint -> the Hub."""

from .hub import push
from .merge import export
from .plan import ExportSources
from .sources import CheckpointError

__all__ = ["CheckpointError", "ExportSources", "export", "push"]
