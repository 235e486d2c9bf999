"""Names of a package whose modules are imported when they are asked for: torch takes seconds that many uses do without."""

from collections.abc import Callable
from importlib import import_module


def on_demand(package: str, modules: dict[str, str]) -> Callable:
    """
    The `__getattr__` of a package.

    Args:
        package (`str`): Its name.
        modules (`dict[str, str]`): The names that it gives, and the module of each.
    """

    def get(name):
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{modules[name]}", package), name)

    return get
