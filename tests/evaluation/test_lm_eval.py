"""The lm-evaluation-harness runs a checkpoint by itself, as the example says."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from datasets import Dataset, Features, Image, Value

from healthgpt.phantoms import comprehension_sample

ROOT = Path(__file__).parent.parent.parent


def test_the_harness_scores_the_small_model(tmp_path):
    """On phantoms in the form of VQA-RAD, which cannot be downloaded here."""
    samples = [comprehension_sample("test", number, "modality") for number in range(12)]
    rows = [
        {"image": sample["input_image"], "question": sample["instruction"], "answer": sample["response"]}
        for sample in samples
    ]
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "test.parquet")
    task = yaml.safe_load((ROOT / "evaluation/lm_eval/vqa_rad.yaml").read_text())
    task |= {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.parquet")}}}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf-multimodal", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={ROOT / 'nano'},trust_remote_code=True", "--apply_chat_template"]
    command += [
        "--include_path",
        str(tmp_path),
        "--tasks",
        "healthgpt_vqa_rad",
        "--output_path",
        str(tmp_path / "out"),
    ]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    [results] = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["healthgpt_vqa_rad"]["exact_match,none"] >= 0.9
