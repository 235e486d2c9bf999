"""LPIPS against a plain restatement, on an AlexNet of random weights: the trained ones are a download. Run by `make test-lpips`."""

import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

TORCHVISION = os.environ.get("TORCHVISION")  # its folder
pytestmark = pytest.mark.skipif(TORCHVISION is None, reason="torchvision stands apart: make test-lpips")


@pytest.fixture
def alexnet(tmp_path, monkeypatch):
    """The weights of an AlexNet, where torchvision looks for those that it has downloaded."""
    monkeypatch.syspath_prepend(TORCHVISION)
    if torch.version.cuda is None:  # the usual torchvision is built for CUDA: what it registers then is not there
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    torch.manual_seed(0)
    weights = torchvision.models.alexnet().state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    name = Path(torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url).name
    torch.save(weights, tmp_path / "hub/checkpoints" / name)
    return weights


def restated(drawn, true, weights):
    """Equation 1 of Zhang et al. 2018, in percent: weighted squares of unit features' differences, after each of AlexNet's five ReLUs."""
    from torchmetrics.functional.image import lpips

    heads = torch.load(Path(inspect.getfile(lpips)).parent / "lpips_models/alex.pth", map_location="cpu")
    pictures = torch.stack([torch.tensor(np.asarray(picture)).movedim(-1, 0) / 127.5 - 1 for picture in (drawn, true)])
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    features, total = (pictures - shift[:, None, None]) / scale[:, None, None], 0
    for layer, (index, stride, padding, pool) in enumerate(
        [(0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False)]
    ):
        features = functional.max_pool2d(features, 3, 2) if pool else features
        weight, bias = weights[f"features.{index}.weight"], weights[f"features.{index}.bias"]
        features = functional.conv2d(features, weight, bias, stride, padding).relu()
        unit = features / features.norm(dim=1, keepdim=True)
        total += ((unit[0] - unit[1]).square() * heads[f"lin{layer}.model.1.weight"][0]).sum(dim=0).mean()
    return 100 * total.item()


def test_lpips_is_that_of_its_equation(alexnet):
    from healthgpt.evaluation import load_lpips

    lpips = load_lpips()
    rng = np.random.default_rng(0)
    true = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
    scores = []
    for noise in (10, 160):
        drawn = Image.fromarray(np.clip(true + rng.normal(0, noise, true.shape), 0, 255).astype(np.uint8))
        scores.append(lpips(drawn, Image.fromarray(true)))
        assert scores[-1] == pytest.approx(restated(drawn, Image.fromarray(true), alexnet), rel=1e-4)
    assert lpips(Image.fromarray(true), Image.fromarray(true)) == 0 < scores[0] < scores[1]
    with pytest.raises(ValueError, match="AlexNet needs pictures of at least 31 x 31 pixels, and these have 40 x 30"):
        lpips(*[Image.new("RGB", (40, 30))] * 2)
