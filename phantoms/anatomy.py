"""
The pictures: seven modalities, each with a drawn anatomy and the findings that it may show.

Everything that varies comes from one random generator, hence a seed names a picture. Left and right are the patient's,
as radiologists say them: left is on the right of the picture.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .shapes import SIZE, X, Y, curve, ellipse, noise, over, step, to_picture

# Findings by modality; those in SIDED lie on the left or the right.
FINDINGS = {
    "X-ray": ("pleural effusion", "pneumonia", "pneumothorax", "cardiomegaly"),
    "CT": ("hemorrhage", "infarct"),
    "MRI": ("hemorrhage", "infarct"),
    "microscopy": ("tumor cells", "necrosis"),
    "OCT": ("macular edema", "drusen"),
    "fundus": ("hemorrhages", "exudates"),
    "ultrasound": ("cyst", "stone"),
}
MODALITIES = tuple(FINDINGS)
ORGANS = {
    "X-ray": "chest",
    "CT": "brain",
    "MRI": "brain",
    "microscopy": "tissue",
    "OCT": "retina",
    "fundus": "retina",
    "ultrasound": "liver",
}
SIDED = ("pleural effusion", "pneumonia", "pneumothorax", "hemorrhage", "infarct", "cyst", "stone")
BUILDS = ("small", "average", "large")
NORMAL = 0.3  # share of pictures without a finding


@dataclass(frozen=True)
class Case:
    """
    One picture and what it shows.

    Args:
        modality (`str`): One of `MODALITIES`.
        finding (`str`, *optional*): One of the modality's `FINDINGS`; `None` if nothing is abnormal.
        side (`str`, *optional*): `"left"` or `"right"` of the patient, for findings that have a side.
        build (`str`, *optional*): The patient's, one of `BUILDS`; X-rays only.
        picture (`PIL.Image.Image`): RGB, 64 x 64 pixels.
    """

    modality: str
    finding: str | None
    side: str | None
    build: str | None
    picture: Image.Image


def draw_case(rng: np.random.Generator, modality: str | None = None) -> Case:
    """Draws a picture of a modality, or of any."""
    modality = modality or str(rng.choice(MODALITIES))
    if modality in ("CT", "MRI"):
        return draw_brain_pair(rng)[modality == "MRI"]
    finding, side = draw_finding(rng, modality)
    if modality == "X-ray":
        build = str(rng.choice(BUILDS))
        return Case(modality, finding, side, build, to_picture(chest(rng, finding, side, build)))
    draw = {"microscopy": tissue, "OCT": retina_layers, "fundus": fundus, "ultrasound": liver}[modality]
    return Case(modality, finding, side, None, to_picture(draw(rng, finding, side)))


def draw_brain_pair(rng: np.random.Generator) -> tuple[Case, Case]:
    """CT and MRI of the same head."""
    finding, side = draw_finding(rng, "CT")
    ct, mri = brain(rng, finding, side)
    return Case("CT", finding, side, None, to_picture(ct)), Case("MRI", finding, side, None, to_picture(mri))


def draw_finding(rng, modality):
    finding = None if rng.random() < NORMAL else str(rng.choice(FINDINGS[modality]))
    return finding, str(rng.choice(("left", "right"))) if finding in SIDED else None


def sign(side) -> int:
    """Where a side of the patient lies along `X`."""
    return 1 if side == "left" else -1


def chest(rng, finding, side, build):
    """Frontal chest X-ray: bones and organs are bright, air is dark."""
    scale = {"small": 0.8, "average": 0.9, "large": 1.0}[build]
    jitter = rng.uniform(-0.02, 0.02, 8)
    body = step(scale * (0.98 - 0.12 * (Y < -0.55) * (-Y - 0.55) * 6) - np.abs(X))
    picture = 0.04 + body * 0.62
    picture = over(picture, ellipse(0, -1.0, 0.2, 0.35), 0.6)
    lungs = {}
    for name in ("left", "right"):
        x = sign(name) * 0.44 * scale + jitter[0]
        lung = ellipse(x, -0.08 + jitter[1], 0.3 * scale, 0.62, sign(name) * -0.08)
        lungs[name] = lung * step(0.44 + 0.1 * sign(name) * scale - 0.5 * (X - x) ** 2 - Y)
        picture = over(picture, lungs[name], 0.2)
    both = lungs["left"] + lungs["right"]
    for index in range(7):
        rib = -0.62 + 0.17 * index + 0.35 * (np.abs(X) / scale - 0.25) ** 2 + jitter[2]
        picture = picture + curve(rib, 0.022) * step(0.8 * scale - np.abs(X)) * 0.13
    for name in ("left", "right"):
        collar = -0.66 - 0.12 * np.abs(X) + jitter[3]
        picture = picture + curve(collar, 0.03) * step(sign(name) * X) * step(0.75 * scale - np.abs(X)) * 0.12
    picture = over(picture, step(0.1 * scale - np.abs(X - jitter[4])) * 0.85, 0.74)
    picture = picture + step(0.05 - np.abs(((Y * 8) % 1) - 0.5) * 0.2) * step(0.05 - np.abs(X)) * 0.06
    size = 0.42 if finding == "cardiomegaly" else 0.25
    picture = over(
        picture, ellipse(0.1 * scale + jitter[5], 0.27, size * scale, 0.26 + 0.1 * (size - 0.25), 0.35), 0.8
    )
    if finding == "pleural effusion":
        level = 0.08 + jitter[6] - 0.25 * (np.abs(X) - 0.4 * scale)
        picture = over(picture, lungs[side] * step(Y - level, 0.06), 0.72)
    elif finding == "pneumonia":
        patch = ellipse(sign(side) * 0.46 * scale, 0.02 + jitter[6], 0.2, 0.2, edge=0.2)
        picture = over(picture, patch * both * 0.85, 0.62)
    elif finding == "pneumothorax":
        picture = over(picture, lungs[side] * step(sign(side) * X - 0.47 * scale + 0.1 * (Y + 0.1) ** 2, 0.02), 0.04)
    return picture + 0.008 * rng.standard_normal((SIZE, SIZE))


def brain(rng, finding, side):
    """Axial slices of one head, as CT (bone bright) and T2-weighted MRI (water bright, bone dark)."""
    width, height, angle = rng.uniform(0.62, 0.74), rng.uniform(0.8, 0.9), rng.uniform(-0.12, 0.12)
    x, y = rng.uniform(-0.05, 0.05, 2)
    head = ellipse(x, y, width + 0.12, height + 0.1, angle)
    outside = ellipse(x, y, width + 0.06, height + 0.05, angle)
    inside = ellipse(x, y, width, height, angle)
    u = (X - x) * np.cos(angle) + (Y - y) * np.sin(angle)
    v = (Y - y) * np.cos(angle) - (X - x) * np.sin(angle)
    radius = np.sqrt((u / width) ** 2 + (v / height) ** 2)
    folds = rng.uniform(9, 12)
    phase = rng.uniform(0, 6.28)
    cortex = step(radius - 0.82 + 0.05 * np.sin(folds * np.arctan2(v, u) + phase), 0.06)
    gap = step(0.018 - np.abs(u), 0.02) * step(np.abs(v) - 0.35, 0.05)
    opening = rng.uniform(0.7, 1.3)
    ventricles = 0
    for turn in (-1, 1):
        for front in (-1, 1):
            ventricles = ventricles + ellipse(
                x + turn * 0.13 * np.cos(angle) - front * 0.2 * np.sin(angle),
                y + front * 0.2 * np.cos(angle) + turn * 0.13 * np.sin(angle),
                0.06 * opening,
                0.19,
                angle + turn * front * 0.35,
            )
    ventricles = np.minimum(ventricles, 1)
    place = (x + sign(side) * rng.uniform(0.3, 0.42), y + rng.uniform(-0.35, 0.35))
    lesion = ellipse(*place, rng.uniform(0.14, 0.22), rng.uniform(0.14, 0.24), rng.uniform(0, 3), edge=0.05) * inside
    texture = 0.012 * noise(rng, 10)

    ct = head * 0.35
    ct = over(ct, outside, 0.98)
    ct = over(ct, inside, 0.42 + 0.06 * cortex + texture)
    ct = over(ct, np.maximum(ventricles, gap) * inside, 0.2)
    mri = head * 0.75
    mri = over(mri, outside, 0.05)
    mri = over(mri, inside, 0.32 + 0.2 * cortex + 2 * texture)
    mri = over(mri, np.maximum(ventricles, gap) * inside, 0.97)
    if finding == "hemorrhage":
        ct, mri = over(ct, lesion, 0.82), over(mri, lesion, 0.1)
    elif finding == "infarct":
        ct, mri = over(ct, lesion, 0.26), over(mri, lesion, 0.82)
    return ct, mri


def tissue(rng, finding, side):
    """Stained tissue under the microscope: pink ground, violet nuclei."""
    picture = np.ones((SIZE, SIZE, 3)) * [0.93, 0.76, 0.85] + 0.03 * noise(rng, 8)[..., None]
    picture = over(picture, step(noise(rng, 5) - 1.1, 0.4) * 0.6, [0.98, 0.93, 0.97])
    dense = finding == "tumor cells"
    for _ in range(60 if dense else 22):
        size = rng.uniform(0.06, 0.12) if dense else rng.uniform(0.05, 0.065)
        shape = (*rng.uniform(-1, 1, 2), size, size * rng.uniform(0.7, 1), rng.uniform(0, 3))
        picture = over(picture, ellipse(*shape) * 0.9, [0.36, 0.2, 0.52] if dense else [0.45, 0.3, 0.62])
    if finding == "necrosis":
        picture = over(picture, ellipse(*rng.uniform(-0.3, 0.3, 2), 0.55, 0.5, edge=0.15), [0.88, 0.55, 0.62])
    return picture


def retina_layers(rng, finding, side):
    """OCT: layers of the retina from top to bottom with the pit of the fovea, speckled."""
    pit = 0.16 * np.exp(-((X - rng.uniform(-0.1, 0.1)) ** 2) / 0.06)
    tilt = rng.uniform(-0.08, 0.08) * X
    top = -0.32 + rng.uniform(-0.06, 0.06) + tilt
    bumps = np.zeros_like(X)
    if finding == "drusen":
        for place in rng.uniform(-0.85, 0.85, 5):
            bumps += 0.1 * np.exp(-((X - place) ** 2) / 0.008)
    swelling = 0.16 * np.exp(-(X**2) / 0.2) if finding == "macular edema" else 0
    bottom = top + 0.62
    picture = 0.05 + 0.0 * X
    for start, end, value in ((0.0, 0.1, 0.75), (0.1, 0.26, 0.45), (0.26, 0.36, 0.6), (0.36, 0.5, 0.3)):
        upper = top + start + (pit - swelling) * (1 - start / 0.62)
        lower = top + end + (pit - swelling) * (1 - end / 0.62)
        picture = over(picture, step(Y - upper, 0.03) * step(lower - Y, 0.03), value)
    picture = over(picture, step(Y - bottom + 0.12 + bumps, 0.03) * step(bottom - Y, 0.03), 0.95)
    picture = over(picture, step(Y - bottom, 0.03) * np.exp(-np.maximum(Y - bottom, 0) / 0.25), 0.5)
    if finding == "macular edema":
        for _ in range(4):
            place = rng.uniform(-0.3, 0.3), -0.12 + rng.uniform(-0.08, 0.1)
            picture = over(picture, ellipse(*place, 0.1, 0.08), 0.06)
    return np.clip(picture * (1 + 0.07 * rng.standard_normal((SIZE, SIZE))), 0, 1)


def fundus(rng, finding, side):
    """Photograph of the back of the eye: orange disc, bright optic disc, vessels, dark macula."""
    field = step(0.94 - np.sqrt(X**2 + Y**2), 0.03)
    eye = 1 if rng.random() < 0.5 else -1
    light = 1 - 0.35 * (X**2 + Y**2) + 0.03 * noise(rng, 4)
    picture = field[..., None] * np.stack([0.82 * light, 0.4 * light, 0.16 * light], axis=-1)
    disc = eye * 0.5 + rng.uniform(-0.04, 0.04), rng.uniform(-0.06, 0.06)
    for turn in (-1, 1):
        for spread in (0.35, 0.75):
            reach = np.clip((disc[0] - X) * eye, 0, 2)
            line = disc[1] + turn * spread * np.sqrt(reach + 1e-6) * (1.1 - 0.3 * reach)
            vessel = curve(line, 0.018 * (1.6 - 0.5 * reach)) * step(reach - 0.02)
            picture = over(picture, vessel * field * 0.8, [0.45, 0.1, 0.06])
    picture = over(picture, ellipse(-eye * 0.15, 0, 0.16, 0.16, edge=0.15) * 0.5 * field, [0.5, 0.18, 0.08])
    picture = over(picture, ellipse(*disc, 0.15, 0.17), [0.98, 0.85, 0.55])
    if finding is not None:
        colour = [0.35, 0.02, 0.02] if finding == "hemorrhages" else [1.0, 0.95, 0.45]
        for _ in range(7):
            distance, turn = rng.uniform(0.2, 0.75), rng.uniform(0, 6.28)
            place = distance * np.cos(turn), distance * np.sin(turn)
            picture = over(picture, ellipse(*place, 0.07, 0.07 * rng.uniform(0.7, 1)) * field, colour)
    return picture


def liver(rng, finding, side):
    """Ultrasound: a speckled fan under the probe."""
    depth = np.sqrt(X**2 + (Y + 1.25) ** 2)
    fan = step(0.62 - np.abs(np.arctan2(X, Y + 1.25)), 0.03) * step(depth - 0.35) * step(2.1 - depth)
    picture = 0.42 + 0.05 * noise(rng, 6) - 0.1 * (depth - 1)
    line = 0.62 + 0.2 * X + rng.uniform(-0.08, 0.08)
    picture = over(picture, curve(line, 0.04) * 0.9, 0.9)
    for _ in range(3):
        picture = over(picture, ellipse(*rng.uniform(-0.5, 0.5, 2), 0.05, 0.12, rng.uniform(0, 3)), 0.2)
    place = sign(side) * rng.uniform(0.25, 0.38), rng.uniform(-0.15, 0.2)
    behind = step(Y - place[1]) * step(0.14 - np.abs(X - place[0] - 0.4 * place[0] * (Y - place[1])), 0.05)
    if finding == "cyst":
        picture = over(picture, behind * 0.5, 0.75)
        picture = over(picture, ellipse(*place, 0.2, 0.18), 0.02)
    elif finding == "stone":
        picture = over(picture, behind * 0.9, 0.04)
        picture = over(picture, ellipse(*place, 0.17, 0.08), 1.0)
    return fan * np.clip(picture * (1 + 0.08 * rng.standard_normal((SIZE, SIZE))), 0, 1)
