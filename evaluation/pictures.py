"""Generation: drawn pictures against true ones, by the metrics of scikit-image and torchmetrics."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from ..conversations import conversation, prepare
from ..errors_healthgpt import HealthGPTError
from ..medical import open_picture
from ..refusals import files, reason_of
from .answers import mean_of
from .records import Records

WANG_2004 = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
WINDOW = 11  # pixels
SMALLEST_LPIPS = 31  # pixels, of which AlexNet's last pooling leaves one
IDENTICAL_PSNR = 100.0  # dB; that of equal pictures is infinite and would hide all others in a mean


def pair_folders(drawn: Path, true: Path) -> list[tuple[Path, Path]]:
    """
    Pairs the files of two folders, all but hidden ones, by their names without endings.

    Raises:
        HealthGPTError: if a picture has no partner or two, or a folder has none.
    """
    found = []
    for folder in (drawn, true):
        if not os.path.isdir(folder):
            raise HealthGPTError(f"{folder} is no folder.")
        with files(folder):
            paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
        if not paths:
            raise HealthGPTError(f"{folder} has no pictures.")
        found.append({stem_of(path): path for path in paths})
        if len(found[-1]) < len(paths):
            name = next(stem_of(path) for path in paths if path not in found[-1].values())
            raise HealthGPTError(f"{folder} cannot be paired by names: two pictures are named {name!r}.")
    alone = found[0].keys() ^ found[1].keys()
    if alone:
        raise HealthGPTError(
            f"{drawn} and {true} are no paired folders: {sorted(alone)[0]!r} lies in only one of them."
        )
    return [(found[0][name], found[1][name]) for name in sorted(found[0])]


def stem_of(path: Path) -> str:
    """The name of a picture file without its ending, if it has one: a DICOM file is often named by a number with dots."""
    name = Path(path.name.removesuffix(".gz"))
    known = name.suffix.lower() in {".dcm", ".dicom", ".nii", *Image.registered_extensions()}
    return name.stem if known else name.name


def compare_pictures(drawn, true) -> dict[str, float]:
    """
    SSIM (Wang et al. 2004, with their Gaussian window; in percent), PSNR (dB) and MSE of two pictures as RGB of 8 bits.

    Args:
        drawn, true (`PIL.Image.Image`): Pictures of one size.

    Raises:
        HealthGPTError: if their sizes differ, or they are smaller than the window of SSIM, 11 x 11 pixels.
    """
    if drawn.size != true.size:
        raise HealthGPTError(
            f"The drawn picture has {drawn.width} x {drawn.height} pixels and the true one {true.width} x {true.height}: they "
            "cannot be compared."
        )
    if min(drawn.size) < WINDOW:
        raise HealthGPTError(
            f"SSIM compares windows of {WINDOW} x {WINDOW} pixels, and the pictures have {drawn.size[0]} x {drawn.size[1]}."
        )
    drawn, true = np.asarray(drawn.convert("RGB")), np.asarray(true.convert("RGB"))
    error = mean_squared_error(true, drawn)
    return {
        "SSIM": 100 * float(structural_similarity(true, drawn, channel_axis=-1, data_range=255, **WANG_2004)),
        "PSNR": float(peak_signal_noise_ratio(true, drawn, data_range=255)) if error > 0 else IDENTICAL_PSNR,
        "MSE": float(error),
    }


def load_lpips() -> Callable:
    """
    LPIPS (Zhang et al. 2018) of torchmetrics with AlexNet, as a function of two PIL pictures of at least 31 x 31 pixels, in percent.

    Raises:
        HealthGPTError: if torchvision, whose AlexNet it needs, is not installed, or its weights cannot be downloaded.
    """
    import torch
    from torchmetrics.utilities.imports import _TORCHVISION_AVAILABLE

    if not _TORCHVISION_AVAILABLE:
        raise HealthGPTError(
            "LPIPS needs torchvision, whose AlexNet it compares pictures with: pip install torchvision."
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    except OSError as error:
        raise HealthGPTError(
            f"LPIPS needs the weights of AlexNet, which cannot be had: {reason_of(error)}."
        ) from error

    def lpips(drawn, true):
        if min(drawn.size) < SMALLEST_LPIPS:
            raise HealthGPTError(
                f"LPIPS's AlexNet needs pictures of at least {SMALLEST_LPIPS} x {SMALLEST_LPIPS} pixels, and these have "
                f"{drawn.size[0]} x {drawn.size[1]}."
            )
        tensors = [
            torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None] / 255
            for picture in (drawn, true)
        ]
        return 100 * metric(*tensors).item()

    return lpips


def draw_samples(
    model,
    processor,
    samples: list[dict],
    folder: Path,
    records: Records,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda number: None,
) -> None:
    """
    Draws what samples ask for, into pictures `0.png`, `1.png`, ... of a folder; those that are there and have a record are
    left as they are.

    Args:
        model, processor: As `from_pretrained` loads them.
        samples (`list[dict]`): As `healthgpt.samples.read_samples` reads them.
        folder (`Path`): Folder of the pictures.
        records (`Records`): What an earlier run has drawn.
        batch_size (`int`, defaults to 8): Pictures drawn at once.
        progress (`Callable`, *optional*): Called with the number of pictures that were drawn since the last call.

    Raises:
        HealthGPTError: if a picture cannot be read or written.
    """
    with files(folder, "made"):
        folder.mkdir(exist_ok=True)
    left = [
        number
        for number in range(len(samples))
        if str(number) not in records.done or not (folder / f"{number}.png").exists()
    ]
    progress(len(samples) - len(left))
    for start in range(0, len(left), batch_size):
        numbers = left[start : start + batch_size]
        tasks = [samples[number]["task"] for number in numbers]
        conversations = []
        for number in numbers:
            pictures = [open_picture(path) for path in samples[number]["input_image"]]
            conversations.append(conversation(pictures, samples[number]["instruction"]))
        inputs = prepare(processor, conversations, tasks).to(model.device)
        sequences = model.generate(**inputs, task=tasks, do_sample=False)
        pixels = model.decode_image_tokens(sequences)
        for number, picture in zip(
            numbers, processor.post_process_multimodal_output(pixels, generation_mode="image"), strict=True
        ):
            with files(folder / f"{number}.png", "written"):
                picture.save(folder / f"{number}.png")
        records.add([{"name": str(number)} for number in numbers])
        progress(len(numbers))


def summarise_pictures(scores: list[dict[str, float]]) -> dict[str, dict]:
    """Mean of every metric with its 95 % interval."""
    return {metric: mean_of([score[metric] for score in scores]) for metric in scores[0]}
