"""The three published models: where their parts lie on the Hub and what their authors measured."""

from dataclasses import dataclass

from .confine import CheckpointError

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
        sizes (`tuple[int, int]`): Layers of its language model and their width.
        sources (`dict[str, str]`): Fields of `ExportSources`. The VQGAN is not on the Hub.
        results (`dict[str, dict[str, float]]`): What the paper reports, by benchmark and metric: accuracy in percent over
            the closed and over all questions; SSIM and LPIPS in percent, PSNR in dB, MSE of 8-bit levels.
    """

    name: str
    license: str
    sizes: tuple[int, int]
    sources: dict[str, str]
    results: dict[str, dict[str, float]]


# What the paper's benchmarks are called here and there.
BENCHMARKS = {
    "vqa_rad": "VQA-RAD",
    "slake": "SLAKE",
    "path_vqa": "PathVQA",
    "mmmu_med": "MMMU-Med",
    "omnimedvqa": "OmniMedVQA",
    "average": "Average over the benchmarks of comprehension",
    "ct_to_mri_brain": "CT to MRI, brain",
    "ct_to_mri_pelvis": "CT to MRI, pelvis",
    "mri_to_ct_brain": "MRI to CT, brain",
    "mri_to_ct_pelvis": "MRI to CT, pelvis",
    "super_resolution": "4x super-resolution",
    "reconstruction": "Reconstruction, CT brain",
}


def pictures(ssim: float, psnr: float, mse: float) -> dict[str, float]:
    return {"SSIM": ssim, "PSNR": psnr, "MSE": mse}


PRESETS = {
    "m3": Preset(
        "HealthGPT-M3",
        "mit",
        (32, 3072),
        {
            "base": "microsoft/Phi-3-mini-4k-instruct",
            "vision": VISION,
            "comprehension": "hf://lintw/HealthGPT-M3/com_hlora_weights.bin",
            "generation": "hf://lintw/HealthGPT-M3/gen_hlora_weights.bin",
            "fusion": "hf://lintw/HealthGPT-M3/fusion_layer_weights.bin",
        },
        {
            "vqa_rad": {"closed": 73.7, "all": 55.9},
            "slake": {"closed": 74.6, "all": 56.4},
            "path_vqa": {"closed": 78.7, "all": 39.7},
            "mmmu_med": {"all": 43.3},
            "omnimedvqa": {"all": 68.5},
            "average": {"all": 61.3},
            "ct_to_mri_brain": pictures(79.38, 33.03, 33.48),
            "ct_to_mri_pelvis": pictures(71.81, 31.83, 43.45),
            "mri_to_ct_brain": pictures(85.06, 34.40, 25.49),
            "mri_to_ct_pelvis": pictures(84.23, 34.29, 27.99),
            "super_resolution": pictures(78.19, 32.76, 34.47) | {"LPIPS": 12.02},
            "reconstruction": pictures(91.73, 36.42, 15.46),
        },
    ),
    "l14": Preset(
        "HealthGPT-L14",
        "mit",
        (40, 5120),
        {
            "base": "microsoft/phi-4",
            "vision": VISION,
            "comprehension": "hf://lintw/HealthGPT-L14/com_hlora_weights_phi4.bin",
        },
        {
            "vqa_rad": {"closed": 77.7, "all": 58.3},
            "slake": {"closed": 76.4, "all": 64.5},
            "path_vqa": {"closed": 85.9, "all": 44.4},
            "mmmu_med": {"all": 49.2},
            "omnimedvqa": {"all": 74.4},
            "average": {"all": 66.4},
        },
    ),
    "xl32": Preset(
        "HealthGPT-XL32",
        "apache-2.0",
        (64, 5120),
        {
            "base": "Qwen/Qwen2.5-32B-Instruct",
            "vision": VISION,
            "comprehension": "hf://lintw/HealthGPT-XL32/com_hlora_weights_QWEN_32B.bin",
        },
        {"average": {"all": 70.4}},
    ),
}


def require_preset(config, name: str) -> None:
    """
    Raises:
        CheckpointError: if there is no such preset, or the files are not of its size.
    """
    if name not in PRESETS:
        raise CheckpointError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    preset, sizes = PRESETS[name], (config.text_config.num_hidden_layers, config.text_config.hidden_size)
    if sizes != preset.sizes:
        raise CheckpointError(
            f"The files are not those of {preset.name}, whose language model has {preset.sizes[0]} layers of width "
            f"{preset.sizes[1]}: this one has {sizes[0]} of {sizes[1]}."
        )
