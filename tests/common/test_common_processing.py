"""The library's common tests of processors, on those of the golden checkpoints."""

import json
import tempfile
import unittest
from pathlib import Path

from conftest import GOLDEN, sources_of
from known_failures import M3, PROCESSORS
from library import must_fail
from transformers_tests.test_processing_common import ProcessorTesterMixin

from healthgpt import HealthGPTProcessor
from healthgpt.hub_export import export


class CommonTests(ProcessorTesterMixin):
    processor_class = HealthGPTProcessor
    checkpoint = None

    @classmethod
    def setUpClass(cls):
        with tempfile.TemporaryDirectory() as folder:
            cls.model_id = Path(folder) / "checkpoint"
            export(sources_of(GOLDEN / cls.checkpoint), cls.model_id)
            written = json.loads((cls.model_id / "processor_config.json").read_text())
            cls.settings = {
                name: written[name] for name in ("tasks", "num_image_patches", "prefix_space", "picture_size")
            }
            super().setUpClass()

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
