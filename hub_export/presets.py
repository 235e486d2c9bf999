"""The three published models: where their parts lie on the Hub and what their authors measured."""

from dataclasses import dataclass

PAPER = "https://arxiv.org/abs/2502.09838"
VISION = "openai/clip-vit-large-patch14-336"
DATASET = "lintw/VL-Health"


@dataclass(frozen=True)
class Preset:
    """
    One published model.

    Args:
        name (`str`): As its authors call it.
        license (`str`): That of the base, as the Hub writes it.
        sources (`dict[str, str]`): Fields of `ExportSources`. The VQGAN is not on the Hub.
        results (`dict[str, str]`): What the paper reports, by benchmark.
    """

    name: str
    license: str
    sources: dict[str, str]
    results: dict[str, str]


PRESETS = {
    "m3": Preset(
        "HealthGPT-M3",
        "mit",
        {
            "base": "microsoft/Phi-3-mini-4k-instruct",
            "vision": VISION,
            "comprehension": "hf://lintw/HealthGPT-M3/com_hlora_weights.bin",
            "generation": "hf://lintw/HealthGPT-M3/gen_hlora_weights.bin",
            "fusion": "hf://lintw/HealthGPT-M3/fusion_layer_weights.bin",
        },
        {
            "VQA-RAD, accuracy closed / all": "73.7 / 55.9",
            "SLAKE, accuracy closed / all": "74.6 / 56.4",
            "PathVQA, accuracy closed / all": "78.7 / 39.7",
            "MMMU-Med, accuracy": "43.3",
            "OmniMedVQA, accuracy": "68.5",
            "CT to MRI, brain, SSIM / PSNR / MSE": "79.38 / 33.03 / 33.48",
            "CT to MRI, pelvis, SSIM / PSNR / MSE": "71.81 / 31.83 / 43.45",
            "MRI to CT, brain, SSIM / PSNR / MSE": "85.06 / 34.40 / 25.49",
            "MRI to CT, pelvis, SSIM / PSNR / MSE": "84.23 / 34.29 / 27.99",
            "4x super-resolution, SSIM / PSNR / MSE": "78.19 / 32.76 / 34.47",
            "Reconstruction, CT brain, SSIM / PSNR / MSE": "91.73 / 36.42 / 15.46",
        },
    ),
    "l14": Preset(
        "HealthGPT-L14",
        "mit",
        {
            "base": "microsoft/phi-4",
            "vision": VISION,
            "comprehension": "hf://lintw/HealthGPT-L14/com_hlora_weights_phi4.bin",
        },
        {
            "VQA-RAD, accuracy closed / all": "77.7 / 58.3",
            "SLAKE, accuracy closed / all": "76.4 / 64.5",
            "PathVQA, accuracy closed / all": "85.9 / 44.4",
            "MMMU-Med, accuracy": "49.2",
            "OmniMedVQA, accuracy": "74.4",
        },
    ),
    "xl32": Preset(
        "HealthGPT-XL32",
        "apache-2.0",
        {
            "base": "Qwen/Qwen2.5-32B-Instruct",
            "vision": VISION,
            "comprehension": "hf://lintw/HealthGPT-XL32/com_hlora_weights_QWEN_32B.bin",
        },
        {"Average accuracy over the benchmarks of medical comprehension": "70.4"},
    ),
}
