"""Published HealthGPT files -> one merged checkpoint."""

from .merge import ExportSources, export
from .sources import CheckpointError

__all__ = ["CheckpointError", "ExportSources", "export"]
