"""Benchmarks in the Hub's forms, made small, and what is read from them."""

import json
import shutil

import PIL.Image
import pytest
from conftest import GOLDEN
from datasets import Dataset, Features, Image, Value

from healthgpt.evaluation import items_of, read_benchmark
from healthgpt.samples import read_samples

PICTURE = GOLDEN / "images/ct.png"


def write_parquet(rows, path, pictures):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {name: Image() if name in pictures else Value("string") for name in rows[0]}
    Dataset.from_list(rows, features=Features(features)).to_parquet(str(path))


@pytest.mark.parametrize("name", ["vqa_rad", "path_vqa"])
def test_parquet_of_questions(tmp_path, name):
    rows = [
        {"image": str(PICTURE), "question": "Is it normal?", "answer": "No"},
        {"image": str(PICTURE), "question": "Which plane?", "answer": "axial"},
    ]
    write_parquet(rows, tmp_path / "data/test-00000-of-00001-abc.parquet", ["image"])
    write_parquet(rows[:1], tmp_path / "data/train-00000-of-00001-abc.parquet", ["image"])
    items = list(read_benchmark(name, tmp_path))
    assert [(item.question, item.truth, item.kind) for item in items] == [
        ("Is it normal?", "No", "closed"),
        ("Which plane?", "axial", "open"),
    ]
    assert all(item.pictures()[0].size == PIL.Image.open(PICTURE).size for item in items)
    assert len(list(read_benchmark(name, tmp_path, "train"))) == 1
    write_parquet(rows, tmp_path / "data/test-00000-of-00001-abc.parquet", [])
    with pytest.raises(ValueError, match=r"The column image of .* holds no pictures"):
        list(read_benchmark(name, tmp_path))
    (tmp_path / "data/test-00000-of-00001-abc.parquet").write_bytes(b"Parquet")
    with pytest.raises(ValueError, match=rf"{tmp_path.name} cannot be used: "):
        list(read_benchmark(name, tmp_path))


def test_slake(tmp_path):
    (tmp_path / "imgs/xmlab1").mkdir(parents=True)
    shutil.copy(PICTURE, tmp_path / "imgs/xmlab1/source.jpg")
    row = {"img_name": "xmlab1/source.jpg", "question": "Which organ?", "answer": "Liver", "answer_type": "OPEN"}
    rows = [row | {"qid": 1, "q_lang": "en"}, row | {"qid": 2, "q_lang": "zh"}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    [item] = read_benchmark("slake", tmp_path)
    assert (item.name, item.kind, item.truth) == ("1", "open", "Liver")
    assert item.pictures()[0].size == PIL.Image.open(PICTURE).size
    for change, message in (
        (
            {"question": None},
            "Question 1 needs a text as its question and as its answer, .* got None, 'Liver' and 'open'",
        ),
        ({"answer": 5}, "Question 1 needs a text .*, 5 and 'open'"),
        ({"answer_type": "WHAT"}, "Question 1 needs .* the kind closed or open or choice, .* and 'what'"),
    ):
        (tmp_path / "test.json").write_text(json.dumps([rows[0] | change]))
        with pytest.raises(ValueError, match=message):
            list(read_benchmark("slake", tmp_path))
    (tmp_path / "test.json").write_text(json.dumps([{"q_lang": "en"}]))
    with pytest.raises(ValueError, match=r"does not have the form of slake: a question lacks the entry 'img_name'"):
        list(read_benchmark("slake", tmp_path))
    with pytest.raises(ValueError, match=r"does not have the form of slake: train.json is missing"):
        list(read_benchmark("slake", tmp_path, "train"))
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (tmp_path / "imgs/xmlab1/source.jpg").unlink()
    with pytest.raises(ValueError, match=r"source.jpg, the picture of question 1, does not exist"):
        list(read_benchmark("slake", tmp_path))


def test_mmmu_med(tmp_path):
    subjects = ["Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy"]
    for subject in [*subjects, "Public_Health"]:
        row = {
            "id": f"validation_{subject}_1",
            "question": "See <image 1> and <image 2>?",
            "options": "['up', \"it's <image 2>\"]",
        }
        row |= {"answer": "B", "image_1": str(PICTURE), "image_2": str(PICTURE), "image_3": None}
        pictures = ["image_1", "image_2", "image_3"]
        write_parquet([row], tmp_path / subject / "validation-00000-of-00001.parquet", pictures)
    items = list(read_benchmark("mmmu_med", tmp_path))
    assert len(items) == 5 and items[3].group == "Pharmacy" and len(items[0].pictures()) == 2
    assert items[0].truth == "it's (picture 2)" and items[0].options == ["up", "it's (picture 2)"]
    assert items[0].question.splitlines() == [
        "See (picture 1) and (picture 2)?",
        "(A) up",
        "(B) it's (picture 2)",
        "Answer with the letter of the right option.",
    ]
    with pytest.raises(ValueError, match=r"does not have the form of mmmu_med: .*test-.*parquet is missing"):
        list(read_benchmark("mmmu_med", tmp_path, "test"))
    write_parquet([row | {"answer": "?"}], tmp_path / "Basic_Medical_Science/test-00000-of-00001.parquet", pictures)
    with pytest.raises(ValueError, match="The answers of MMMU's split 'test' are not public"):
        list(read_benchmark("mmmu_med", tmp_path, "test"))


def test_omnimedvqa(tmp_path):
    (tmp_path / "QA_information/Open-access").mkdir(parents=True)
    row = {"question_id": "q1", "question": "Which modality?", "gt_answer": "CT", "image_path": "Images/a.png"}
    row |= {"option_A": "MRI", "option_B": "CT", "modality_type": "CT(Computed Tomography)"}
    (tmp_path / "QA_information/Open-access/set.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=r"Images/a.png, the picture of question q1, does not exist"):
        list(read_benchmark("omnimedvqa", tmp_path))
    (tmp_path / "Images").mkdir()
    shutil.copy(PICTURE, tmp_path / "Images/a.png")
    [item] = read_benchmark("omnimedvqa", tmp_path)
    assert (
        item.name == "set q1"
        and item.options == ["MRI", "CT"]
        and item.group == "CT(Computed Tomography)"
        and item.kind == "choice"
    )
    assert item.pictures()[0].size == PIL.Image.open(PICTURE).size
    (tmp_path / "QA_information/Open-access/set.json").write_text(json.dumps([row | {"gt_answer": "PET"}]))
    with pytest.raises(ValueError, match=r"q1 in .*set.json has an answer that is none of its options"):
        list(read_benchmark("omnimedvqa", tmp_path))


def test_questions_from_samples(data, m3):
    """Of the tasks that answer; those that draw are passed over, and lines count from one."""
    lines = [json.loads(line) for line in (data / "both.jsonl").read_text().splitlines()]
    lines[1] |= {"response": "No.", "group": "CT"}
    (data / "both.jsonl").write_text("\n".join(map(json.dumps, lines[::-1])))
    items = items_of(read_samples(data / "both.jsonl", m3[1].config, m3[2]))
    found = [(item.name, item.question, item.truth, item.kind, item.group, item.task) for item in items]
    last = len(lines)
    assert ("generation" in {line["task"] for line in lines}) and len(items) < last
    assert found[-1] == (str(last), "What is this?", "A head CT.", "open", "", "comprehension")
    assert found[-2] == (str(last - 1), "Name both!", "No.", "closed", "CT", "comprehension")
    assert len(items[-2].pictures()) == 2


@pytest.mark.parametrize(
    "content, message",
    [("{]", "test.json is no JSON: Exp"), ('{"a": 1}', "no list of objects"), ("[1]", "no list of obj")],
)
def test_files_of_another_content(tmp_path, content, message):
    (tmp_path / "test.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_benchmark("slake", tmp_path))


def test_what_is_no_benchmark(tmp_path):
    for name, message in (("vqa", "There is no benchmark 'vqa'; choose one of vqa_rad"), ("slake", "test.json")):
        with pytest.raises(ValueError, match=message):
            list(read_benchmark(name, tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        list(read_benchmark("slake", tmp_path / "nothing"))
