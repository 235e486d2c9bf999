"""Published HealthGPT files -> one merged checkpoint -> the Hub."""

from importlib import import_module

from .confine import CheckpointError

_MODULES = {"ExportSources": "plan", "export": "merge", "push": "hub"}
__all__ = ["CheckpointError", *_MODULES]


def __getattr__(name):
    """Imports torch only for what needs it: the names and files of checkpoints are checked without."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
