"""The library's common tests of models and configurations, on tiny ones of both families and for both tasks."""

import unittest
from contextlib import nullcontext
from unittest.mock import patch

import torch
from known_failures import MODELS, PHI3, QWEN2
from library import must_fail
from transformers import set_seed
from transformers.models.auto import modeling_auto
from transformers_tests import test_modeling_common
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_training_mixin import TrainingTesterMixin

from healthgpt import HealthGPTConfig, HealthGPTForConditionalGeneration, HealthGPTModel, HealthGPTVQGANConfig

# By these names the tests know which class gives a loss and which has images beside its text.
modeling_auto.MODEL_MAPPING_NAMES["healthgpt"] = "HealthGPTModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["healthgpt"] = "HealthGPTForConditionalGeneration"

torch.set_printoptions(threshold=1, edgeitems=1)  # test_bc_torch_dtype writes every weight into a message

NUM_IMAGE_PATCHES = 4
TEXT = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=37,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
VISION = dict(
    model_type="clip_vision_model",
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=8,
    patch_size=4,
)
VQGAN = dict(
    num_codes=16,
    embed_dim=8,
    latent_channels=8,
    resolution=4,
    base_channels=32,
    channel_multipliers=[1],
    num_res_blocks=1,
    attention_resolutions=[],
)
TASKS = {
    "comprehension": dict(kind="text", rank=4, alpha=8, num_experts=2, vision_layer=-2),
    "generation": dict(kind="image", rank=8, alpha=16, num_experts=4, vision_layer=1, token_tables="generation"),
}
# As published: past the tables of Phi-3, inside those of Qwen2.
IMAGE_TOKENS = {"phi3": 99, "qwen2": 70}


class HealthGPTTester:
    """What the tests ask for: a tiny configuration, and inputs with an image in every row."""

    batch_size = 7  # as many as the tests of attention want: rows that they add have no image
    seq_length = 11
    is_training = True
    text_config = TEXT
    vision_config = VISION
    num_hidden_layers = TEXT["num_hidden_layers"]
    num_attention_heads = TEXT["num_attention_heads"]
    hidden_size = TEXT["hidden_size"]

    def __init__(self, family, task):
        self.family = family
        self.task = task

    def get_config(self):
        return HealthGPTConfig(
            text_config={"model_type": self.family, **TEXT},
            vision_config=dict(VISION),
            vqgan_config=dict(VQGAN),
            tasks=TASKS,
            image_token_id=IMAGE_TOKENS[self.family],
            image_start_token_id=6,
            image_code_offset=7,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = test_modeling_common.ids_tensor([self.batch_size, self.seq_length], 60) + 10
        input_ids[:, 1 : 1 + NUM_IMAGE_PATCHES] = IMAGE_TOKENS[self.family]
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(self.batch_size, 3, VISION["image_size"], VISION["image_size"]),
            "task": self.task,
        }


class Trained(HealthGPTForConditionalGeneration):
    """The class for `test_training_overfit` with a task that draws, since the test generates without naming a task."""

    @property
    def generate(self):
        raise AttributeError


class CommonTests(test_modeling_common.ModelTesterMixin, TrainingTesterMixin):
    all_model_classes = (HealthGPTModel, HealthGPTForConditionalGeneration)
    additional_model_inputs = ["pixel_values"]
    test_all_params_have_gradient = False  # the VQGAN and the other task's plugin have none
    _is_composite = True
    training_overfit_steps = 60
    training_overfit_learning_rate = 5e-3

    def setUp(self):
        self.model_tester = HealthGPTTester(self.family, self.task)
        set_seed(42)
        test_modeling_common.global_rng.seed(42)

    def subTest(self, *args, **kwargs):
        """Thousands of them, reported one by one, would take most of the time; the first that fails is enough."""
        return nullcontext()

    def test_training_overfit(self):
        with patch.object(HealthGPTConfig, "vocab_size", TEXT["vocab_size"], create=True):  # as the test asks for it
            super().test_training_overfit()

    def _create_text_training_batch(self, *args, **kwargs):
        return super()._create_text_training_batch(*args, **kwargs) | {"task": self.task}

    def _get_trainable_model_class(self):
        return HealthGPTForConditionalGeneration if self.task == "comprehension" else Trained


@must_fail(MODELS | PHI3)
class Phi3ComprehensionTest(CommonTests, unittest.TestCase):
    family, task = "phi3", "comprehension"


@must_fail(MODELS | PHI3)
class Phi3GenerationTest(CommonTests, unittest.TestCase):
    family, task = "phi3", "generation"


@must_fail(MODELS | QWEN2)
class Qwen2ComprehensionTest(CommonTests, unittest.TestCase):
    family, task = "qwen2", "comprehension"


@must_fail(MODELS | QWEN2)
class Qwen2GenerationTest(CommonTests, unittest.TestCase):
    family, task = "qwen2", "generation"


class ConfigurationTest(unittest.TestCase):
    model_tester = HealthGPTTester("phi3", "comprehension")

    def test_healthgpt(self):
        ConfigTester(self, HealthGPTConfig, has_text_modality=False).run_common_tests()

    def test_vqgan(self):
        tester = ConfigTester(self, HealthGPTVQGANConfig, False, common_properties=["num_codes"], num_codes=32)
        tester.run_common_tests()
