"""The card of the small model: what it is, what it makes of the test split and of real pictures."""

from huggingface_hub import ModelCardData

from ..hub_export.card import ASK_TASK, DRAW_TASK, LOAD, as_literal

CARD = """---
{front_matter}
---

# {name}

A HealthGPT of {parameters:.1f} million parameters, trained from nothing on **phantoms**: drawn stand-ins for medical pictures. It
shows that the package works, without any download.

> **A demonstration, worthless for medicine.** It has never seen a patient. Nothing it says or draws means anything about one.

## Use

```python
{snippet}```

`healthgpt ask`, `healthgpt draw` and `make demo` use it where no other checkpoint is named. Pictures have 64 x 64 pixels.

## What it was trained on

Seven modalities (X-ray, CT, MRI, microscopy, OCT, fundus, ultrasound) with known anatomy and findings, questions with true answers and
true pairs for five drawing tasks, all from `healthgpt.phantoms`. Left and right are the patient's: left is on the right of the picture.
Training, validation and test share no seed. `make nano` trains it in less than an hour on two processor cores: language model, vision
tower and VQGAN first, then the three stages of HealthGPT with the package's own training code.

## On the test split

Accuracy in percent over {questions} questions of each kind, with its 95 % interval, beside the most frequent answer of training:

| question | accuracy | 95 % interval | most frequent answer |
|---|---|---|---|
{answers}

SSIM in percent / PSNR in dB over {drawings} pictures of each task, beside trivial pictures, and beside the true picture through the VQGAN,
which is the most that can be reached:

| task | drawn | input copied | mean of training | VQGAN's ceiling |
|---|---|---|---|---|
{pictures}

The figures above say little about a small finding. Asked what is abnormal in a picture that should show something, the small model names
it, in percent, in what it drew, in the true picture through the VQGAN and in the true picture:

| task | pictures with a finding | drawn | VQGAN's ceiling | truth |
|---|---|---|---|---|
{findings}

{comparison}{real}"""
COMPARISON = """Ways of training it, as the paper compares them (accuracies in percent, then the mean of SSIM and PSNR over the drawing tasks; the
mixed stage has as many steps as the three together). Only stage 2 and the mixed stage train the rows of the token tables that are the
image codes: without them, what is drawn is noise.

| way | modality | finding, yes or no | finding, open | drawing |
|---|---|---|---|---|
{rows}

"""
REAL = """## On real pictures

Pictures that nobody here drew, which it was never meant for:

| picture | "What imaging modality is this?" | "Describe this picture." |
|---|---|---|
{rows}
"""


def nano_card(
    name: str, parameters: int, own: dict, compared: dict[str, dict], real: dict[str, tuple[str, str]]
) -> str:
    """
    The text of README.md.

    Args:
        name (`str`): Folder from which the snippet loads.
        parameters (`int`): Number of parameters.
        own (`dict[str, dict]`): `answers`, `pictures` and `findings` of [`report_answers`], [`report_pictures`] and
            [`report_findings`].
        compared (`dict[str, dict]`): The same by other ways of training, if these were compared.
        real (`dict[str, tuple[str, str]]`): Its modality and its description of real pictures, by name, if there are some.
    """
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="any-to-any",
        language="en",
        tags=["medical", "healthgpt", "h-lora", "custom_code", "demonstration"],
    )
    answers = [
        f'| {kind} | {row["value"]:.1f} | {row["low"]:.1f} to {row["high"]:.1f} | {row["trivial"]:.1f} ("{row["majority"]}") |'
        for kind, row in own["answers"].items()
    ]
    pictures = [
        f"| {task} | {' | '.join(scores(ways[way]) if way in ways else '' for way in ('drawn', 'input', 'mean', 'ceiling'))} |"
        for task, ways in own["pictures"].items()
    ]
    findings = [
        f"| {task} | {ways['truth']['count']} | "
        f"{' | '.join(format(ways[way]['value'], '.0f') for way in ('drawn', 'ceiling', 'truth'))} |"
        for task, ways in own["findings"].items()
    ]
    rows = []
    for way, report in {"three stages": own, **compared}.items():
        cells = [f"{report['answers'][kind]['value']:.1f}" for kind in ("modality", "closed", "open")]
        drawn = [ways["drawn"] for ways in report["pictures"].values()]
        means = (sum(result[metric]["value"] for result in drawn) / len(drawn) for metric in ("SSIM", "PSNR"))
        rows.append(f"| {way} | {' | '.join(cells)} | {' / '.join(f'{mean:.1f}' for mean in means)} |")
    return CARD.format(
        front_matter=data.to_yaml(),
        name=name,
        parameters=parameters / 1e6,
        snippet=LOAD.format(name=as_literal(name))
        + ASK_TASK.format(task="comprehension")
        + DRAW_TASK.format(task="generation"),
        questions=next(iter(own["answers"].values()))["count"],
        drawings=next(iter(own["pictures"].values()))["drawn"]["SSIM"]["count"],
        answers="\n".join(answers),
        pictures="\n".join(pictures),
        findings="\n".join(findings),
        comparison=COMPARISON.format(rows="\n".join(rows)) if compared else "",
        real=REAL.format(rows="\n".join(f"| {picture} | {' | '.join(texts)} |" for picture, texts in real.items()))
        if real
        else "",
    )


def scores(result: dict) -> str:
    return f"{result['SSIM']['value']:.1f} / {result['PSNR']['value']:.1f}"
