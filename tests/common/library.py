"""
The common tests of the transformers library, and how those that are known to fail are marked.

`make test-common` unpacks them from the library's source distribution. That lacks three modules which they import, and a
helper that finds downloaded files; what takes their places here is empty, or an image of this repository.
"""

import sys
from contextlib import suppress
from functools import wraps
from types import ModuleType
from unittest import SkipTest

import pytest
from conftest import GOLDEN

pytest.importorskip("transformers_tests", reason="the library's common tests are run by make test-common")


def stand_in(name: str, **content) -> None:
    """Lets a module be imported that the source distribution lacks."""
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__dict__.update(content)


stand_in("transformers_tests.exporters.test_export", ExportTesterMixin=object)
stand_in("transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
stand_in("transformers_tests.utils.test_configuration_utils", config_common_kwargs={})
stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: str(GOLDEN / "images/ct.png"))


def must_fail(reasons: dict[str, str]):
    """Decorates a class of tests: the named ones must fail. One that passes, is skipped or does not exist is an error."""

    def decorate(tests):
        for name, reason in reasons.items():
            setattr(tests, name, failing(getattr(tests, name), reason))
        return tests

    return decorate


def failing(test, reason: str):
    @pytest.mark.xfail(strict=True, reason=reason)
    @wraps(test)
    def run(self):
        with suppress(SkipTest):  # a skipped test counts as one that passes
            test(self)

    return run
