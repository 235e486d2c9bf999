"""Published HealthGPT files -> one merged checkpoint -> the Hub."""

from ..imports import on_demand
from .confine import CheckpointError

_MODULES = {"ExportSources": "plan", "export": "merge", "push": "hub"}
__all__ = ["CheckpointError", *_MODULES]
__getattr__ = on_demand(__name__, _MODULES)
