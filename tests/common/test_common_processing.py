"""The library's common tests of processors, on those of the golden checkpoints."""

import tempfile
import unittest
from pathlib import Path

from conftest import GOLDEN, sources_of
from known_failures import M3, PROCESSORS
from library import must_fail
from transformers_tests.test_processing_common import ProcessorTesterMixin

from healthgpt import HealthGPTProcessor
from healthgpt.hub_export import export

SETTINGS = ("tasks", "num_image_patches", "prefix_space", "picture_size")


class CommonTests(ProcessorTesterMixin):
    processor_class = HealthGPTProcessor

    @classmethod
    def _setup_from_components(cls):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            export(sources_of(GOLDEN / cls.checkpoint), checkpoint)
            processor = HealthGPTProcessor.from_pretrained(checkpoint)
        cls.settings = {name: getattr(processor, name) for name in SETTINGS}
        return processor

    @classmethod
    def prepare_processor_dict(cls):
        return cls.settings


@must_fail(PROCESSORS | M3)
class M3Test(CommonTests, unittest.TestCase):
    checkpoint = "m3"


@must_fail(PROCESSORS)
class L14Test(CommonTests, unittest.TestCase):
    checkpoint = "l14"


@must_fail(PROCESSORS)
class XL32Test(CommonTests, unittest.TestCase):
    checkpoint = "xl32"
