"""Published HealthGPT files -> one merged checkpoint."""

from .export import ExportSources, export
from .sources import CheckpointError

__all__ = ["CheckpointError", "ExportSources", "export"]
