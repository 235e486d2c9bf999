"""Against a server on loopback that speaks the Hub's protocol: sources by name, push, and what comes back."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import GOLDEN, sources_of, weights_of
from hub_server import TOKEN, serve, sha_of
from huggingface_hub import ModelCard
from warm import programs

from healthgpt.hub_export import export

MAIN = "from healthgpt.app.cli import main; main()"
PUSH = """
import sys
from pathlib import Path
from healthgpt.hub_export import push
print(push(Path(sys.argv[1]), "user/tiny", create_pr="pr" in sys.argv))
"""
ANSWER = """
import sys
import json
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
sys.modules["healthgpt"] = None  # a stranger's process, which runs the code of the repository
model = AutoModelForImageTextToText.from_pretrained("user/tiny", revision=sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained("user/tiny", revision=sys.argv[1], trust_remote_code=True)
for index in (1, 4):
    case = json.loads(open(sys.argv[2] + "/m3/cases.json").read())["cases"][index]
    content = [{"type": "image", "image": Image.open(sys.argv[2] + f"/images/{case['image']}.png")}]
    content = content * (case["image"] is not None) + [{"type": "text", "text": case["question"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], task=case["task"], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )
    sequences = model.generate(**inputs, task=case["task"], max_new_tokens=case["max_new_tokens"])
    assert sequences[0, inputs["input_ids"].shape[1]:].tolist() == case["generated_ids"]
print(getattr(sys.modules[type(model).__module__], "MARK", "unchanged"))
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A server, and programs that start at once and know no other Hub."""
    folder = tmp_path_factory.mktemp("hub")
    with serve() as server:
        server.folder, server.home = folder, folder / "home"
        server.environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(server.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
        }
        with programs(folder, server.environment):
            yield server


@pytest.fixture
def hub(running):
    """The server as new, and an empty cache."""
    shutil.rmtree(running.home, ignore_errors=True)
    running.home.mkdir()
    for state in (running.repositories, running.blobs, running.faults, running.requests, running.ranges):
        state.clear()
    return running


def python(hub, folder, script, *arguments):
    """Runs a script in a folder."""
    (hub.folder / "script.py").write_text(script)
    return run(hub, folder, hub.folder / "python", hub.folder / "script.py", *arguments)


def alone(hub, folder, script, *arguments, offline=False):
    """Runs a script in a process of its own, which has imported nothing before, or without a network."""
    return run(hub, folder, sys.executable, "-c", script, *arguments, HF_HUB_OFFLINE=str(int(offline)))


def healthgpt(hub, folder, *arguments):
    """Runs a command in a folder."""
    return run(hub, folder, hub.folder / "healthgpt", *arguments)


def run(hub, folder, *command, **environment):
    return subprocess.run(
        list(map(str, command)),
        env=hub.environment | environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )


def put(hub, name, folder):
    """A repository on the server with the files of a folder."""
    content = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    hub.repositories[name] = {
        "private": True,
        "revisions": {"main": content, "old": content},
        "shas": {sha_of(content): content},
    }


def m3_on_the_hub(hub):
    m3 = GOLDEN / "m3"
    put(hub, "tiny/base", m3 / "base")
    put(hub, "tiny/vision", m3 / "vit")
    put(hub, "tiny/plugins", m3)
    return [
        "export",
        "--base",
        "tiny/base@old",
        "--vision",
        "tiny/vision",
        "--comprehension",
        "hf://tiny/plugins/com_hlora_weights.bin",
        "--output",
        "out",
    ]


def test_push_load_by_revision_update_code_and_go_offline(hub, tmp_path, checkpoints):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("m3").folder, folder)
    (folder / ".cache").mkdir()
    (folder / ".cache/secret").write_text("not in the plan")
    (folder / "notes.txt").write_text("not in the plan either")
    pushed = python(hub, tmp_path, PUSH, folder)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip().endswith("user/tiny")
    repository = hub.repositories["user/tiny"]
    assert repository["private"] is True
    content = repository["revisions"]["main"]
    expected = {path.name for path in folder.iterdir() if path.is_file()} - {"notes.txt"}
    assert set(content) - {".gitattributes"} == expected
    assert all(content[name] == (folder / name).read_bytes() for name in expected)

    [first] = repository["shas"]
    answered = alone(hub, tmp_path, ANSWER, first, GOLDEN)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip() == "unchanged"

    code = folder / "modeling_healthgpt.py"
    code.write_text(code.read_text() + "\nMARK = 'updated'\n")
    sent = len([path for method, path in hub.requests if method == "PUT"])
    assert python(hub, tmp_path, PUSH, folder).returncode == 0
    assert len([path for method, path in hub.requests if method == "PUT"]) == sent  # no weight was sent again
    for revision, mark in ((first, "unchanged"), ("main", "updated")):
        answered = alone(hub, tmp_path, ANSWER, revision, GOLDEN)
        assert answered.stdout.strip() == mark, answered.stderr
    hub.faults[""] = [500] * 1000  # from here on nobody answers
    answered = alone(hub, tmp_path, ANSWER, "main", GOLDEN, offline=True)
    assert answered.stdout.strip() == "updated", answered.stderr


def test_push_as_a_pull_request(hub, tmp_path, checkpoints):
    folder = checkpoints("l14").folder
    pushed = python(hub, tmp_path, PUSH, folder, "pr")
    assert pushed.stdout.strip() == f"{hub.url}/user/tiny/discussions/1", pushed.stderr
    assert hub.repositories["user/tiny"]["revisions"]["main"] == {}


@pytest.mark.parametrize(
    ("part", "answers", "message"),
    [
        ("api/repos/create", [401] * 9, "user/tiny cannot be used: .*401"),
        ("api/repos/create", [403] * 9, "user/tiny cannot be used: .*403"),
        ("/commit/", [404] * 9, "user/tiny cannot be used: "),
        ("/commit/", [409] * 9, "user/tiny cannot be used: .*409"),
        ("preupload", [500] * 99, "user/tiny cannot be used: .*500"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_and_the_next_push_goes_through(
    hub, tmp_path, checkpoints, part, answers, message
):
    import re

    hub.faults[part] = answers
    script = PUSH.replace("print(push", "from healthgpt.hub_export import CheckpointError\ntry:\n    print(push")
    script += "except CheckpointError as error:\n    print(error)\n    sys.exit(3)\n"
    refused = python(hub, tmp_path, script, checkpoints("l14").folder)
    assert refused.returncode == 3, refused.stderr
    assert re.search(message, refused.stdout) and refused.stdout.count("\n") == 1
    hub.faults.clear()
    assert python(hub, tmp_path, script, checkpoints("l14").folder).returncode == 0


@pytest.mark.parametrize("fault", ["cut", 500])
def test_a_broken_upload_goes_on(hub, tmp_path, checkpoints, fault):
    folder = checkpoints("l14").folder
    hub.faults["PUT /lfs/"] = [fault]
    hub.faults["objects/batch"] = [fault]
    pushed = python(hub, tmp_path, PUSH, folder)
    if pushed.returncode:
        pushed = python(hub, tmp_path, PUSH, folder)
    assert pushed.returncode == 0, pushed.stderr
    assert "config.json" in hub.repositories["user/tiny"]["revisions"]["main"]


def test_sources_by_their_names_on_the_hub(hub, tmp_path):
    arguments = m3_on_the_hub(hub)
    hub.faults["GET /tiny/base/resolve"] = ["cut"]  # a dropped download goes on
    exported = healthgpt(hub, tmp_path, *arguments, "--num-codes", 64)
    assert exported.returncode == 0, exported.stderr
    assert weights_of(tmp_path / "out").keys()
    record = json.loads((tmp_path / "out/healthgpt_export.json").read_text())
    [sha] = hub.repositories["tiny/base"]["shas"]
    assert f"tiny/base@{sha}/model.safetensors" in [source["file"] for source in record["sources"]]
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model == "tiny/base" and card.data.pipeline_tag == "image-text-to-text"
    asked = [path for method, path in hub.requests if "tiny/base" in path and "resolve" in path]
    assert asked and not any("pytorch_model" in path or "tokenizer.json" in path for path in asked)

    shutil.rmtree(tmp_path / "out")
    again = alone(hub, tmp_path, MAIN, *arguments, "--num-codes", 64, offline=True)
    assert again.returncode == 0, again.stderr


def test_a_dry_run_reads_only_the_headers_of_safetensors(hub, tmp_path):
    arguments = m3_on_the_hub(hub)
    dry = healthgpt(hub, tmp_path, *arguments, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    m3 = GOLDEN / "m3"
    places = {"tiny/base@old": m3 / "base", "tiny/vision": m3 / "vit"}
    places["hf://tiny/plugins/com_hlora_weights.bin"] = m3 / "com_hlora_weights.bin"
    local = [places.get(argument, argument) for argument in arguments]
    assert dry.stdout == healthgpt(hub, tmp_path, *local, "--dry-run").stdout
    assert dry.stdout.endswith("The checkpoint answers questions about medical pictures.\n")
    spans = [asked.removeprefix("bytes=").split("-") for path, asked in hub.ranges]
    assert hub.ranges and all(int(stop) - int(start) < 150_000 for start, stop in spans)  # of 529 and 205 kB
    assert not list((hub.home / "hub").rglob("model.safetensors")) and not (tmp_path / "out").exists()

    refused = healthgpt(hub, tmp_path, *arguments, "--dry-run", "--quantize", "2bit")
    assert refused.returncode == 1 and "no quantisation '2bit'" in refused.stderr
    assert healthgpt(hub, tmp_path, *arguments).returncode == 0
    again = alone(hub, tmp_path, MAIN, *arguments, "--dry-run", "--quantize", "8bit", offline=True)
    assert again.returncode == 0 and "GB once the linears are quantised to 8bit" in again.stdout, again.stderr


def test_a_preset_asks_for_the_published_files(hub, tmp_path):
    m3 = GOLDEN / "m3"
    sources = {"microsoft/Phi-3-mini-4k-instruct": m3 / "base", "openai/clip-vit-large-patch14-336": m3 / "vit"}
    for name, folder in {**sources, "lintw/HealthGPT-M3": m3}.items():
        put(hub, name, folder)
    vqgan = ["--vqgan", m3 / "vqgan/last.ckpt", "--vqgan-config", m3 / "vqgan/model.yaml"]
    for more in ([], ["--dry-run"]):
        refused = healthgpt(hub, tmp_path, "export", "--preset", "m3", *vqgan, "--output", "out", *more)
        assert refused.returncode == 1, refused.stdout
        assert "The files are not those of HealthGPT-M3, whose language model has 32 layers" in refused.stderr
    got = {path.split("/resolve/")[0] + " " + path.split("/")[-1] for _, path in hub.requests if "/resolve/" in path}
    weights = {"/lintw/HealthGPT-M3 " + name for name in ("com_hlora_weights.bin", "gen_hlora_weights.bin")}
    weights |= {"/lintw/HealthGPT-M3 fusion_layer_weights.bin"} | {f"/{name} model.safetensors" for name in sources}
    assert {name for name in got if name.endswith((".bin", ".safetensors"))} == weights
    assert not (tmp_path / "out").exists()


def test_a_download_that_is_not_what_the_hub_promised(hub, tmp_path):
    arguments = m3_on_the_hub(hub)
    assert healthgpt(hub, tmp_path, *arguments).returncode == 0
    shutil.rmtree(tmp_path / "out")
    [path] = (hub.home / "hub/models--tiny--base/snapshots").glob("*/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.resolve().write_bytes(data)
    refused = alone(hub, tmp_path, MAIN, *arguments, offline=True)
    assert refused.returncode == 1 and "is damaged: its SHA-256 is" in refused.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--base": "tiny/absent"}, "repository tiny/absent cannot be used: it does not exist, or your token"),
        ({"--base": "tiny/base@v9"}, "repository tiny/base cannot be used: it has no such revision"),
        (
            {"--comprehension": "hf://tiny/plugins/absent.bin"},
            "repository tiny/plugins cannot be used: it has no such",
        ),
        ({"--comprehension": "hf://tiny"}, "hf://tiny is no name of the Hub"),
        ({"--comprehension": "tiny/plugins"}, "tiny/plugins does not exist"),
    ],
)
def test_names_that_lead_nowhere(hub, tmp_path, change, message):
    arguments = m3_on_the_hub(hub)
    for option, value in change.items():
        arguments[arguments.index(option) + 1] = value
    refused = healthgpt(hub, tmp_path, *arguments)
    assert refused.returncode == 1 and message in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "out").exists()


def test_a_download_that_the_hub_forbids(hub, tmp_path):
    arguments = m3_on_the_hub(hub)
    hub.faults["HEAD /tiny/plugins/resolve"] = [403] * 9
    refused = healthgpt(hub, tmp_path, *arguments)
    assert refused.returncode == 1 and "403" in refused.stderr.splitlines()[-1], refused.stderr


def test_export_pushes_when_asked_and_again_without_writing_again(hub, tmp_path):
    arguments = [*m3_on_the_hub(hub), "--num-codes", 64, "--push-to-hub", "user/tiny", "--public"]
    hub.faults["/commit/"] = [409] * 9
    refused = healthgpt(hub, tmp_path, *arguments)
    assert refused.returncode == 1 and "repository user/tiny cannot be used" in refused.stderr
    written = (tmp_path / "out/config.json").stat().st_mtime_ns
    hub.faults.clear()
    pushed = healthgpt(hub, tmp_path, *arguments)
    assert pushed.returncode == 0, pushed.stderr
    assert (tmp_path / "out/config.json").stat().st_mtime_ns == written
    assert hub.repositories["user/tiny"]["private"] is False
    card = hub.repositories["user/tiny"]["revisions"]["main"]["README.md"].decode()
    assert 'from_pretrained("user/tiny", trust_remote_code=True)' in card
    assert json.loads(hub.repositories["user/tiny"]["revisions"]["main"]["healthgpt_export.json"])["sources"]


def test_another_kind_of_export_takes_the_place_of_the_first(hub, tmp_path, checkpoints):
    """A single weight file of the first would be read before the shards of the second."""
    for name, quantize in (("small", "8bit"), ("whole", None)):
        export(sources_of(GOLDEN / "m3"), tmp_path / name, quantize=quantize, skip_forward=True)
        pushed = healthgpt(hub, tmp_path, "push", tmp_path / name, "user/tiny")
        assert pushed.returncode == 0, pushed.stderr
        assert "user/tiny" in (tmp_path / name / "README.md").read_text()
    assert "model.safetensors" not in hub.repositories["user/tiny"]["revisions"]["main"]
    answered = alone(hub, tmp_path, ANSWER, "main", GOLDEN)
    assert answered.returncode == 0, answered.stderr


def test_what_cannot_be_pushed_is_said_before_anything_is_sent(hub, tmp_path, checkpoints):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("m3").folder, folder)
    (folder / "model-plugin_generation-00001-of-00001.safetensors").unlink()
    refused = healthgpt(hub, tmp_path, "push", folder, "user/tiny")
    assert refused.returncode == 1 and "lacks model-plugin_generation-00001-of-00001.safetensors" in refused.stderr
    refused = healthgpt(hub, tmp_path, "push", folder, "no good name!!")
    assert refused.returncode == 1 and "'no good name!!' is no name of a repository" in refused.stderr
    arguments = m3_on_the_hub(hub)
    refused = healthgpt(hub, tmp_path, *arguments, "--push-to-hub", "no good name!!")
    assert refused.returncode == 1 and "is no name of a repository" in refused.stderr
    refused = healthgpt(hub, tmp_path, *arguments, "--public")
    assert refused.returncode == 1 and "go with --push-to-hub" in refused.stderr
    assert not (tmp_path / "out").exists() and "user/tiny" not in hub.repositories


def test_a_checkpoint_by_its_name_whose_index_leads_out_of_the_cache(hub, tmp_path, checkpoints):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("l14").folder, folder)
    put(hub, "user/tiny", folder)
    known = healthgpt(hub, tmp_path, "info", "user/tiny", "--json")
    assert known.returncode == 0 and list(json.loads(known.stdout)["tasks"]) == ["comprehension"], known.stderr
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    [first, *_] = index["weight_map"]
    index["weight_map"][first] = "../../../../outside.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    put(hub, "user/tiny", folder)
    shutil.copy(folder / "model-00001-of-00001.safetensors", tmp_path / "outside.safetensors")
    refused = healthgpt(hub, tmp_path, "ask", "-c", "user/tiny", "What?")
    assert refused.returncode == 1 and "names the file '../../../../outside.safetensors'" in refused.stderr
    assert not [path for _, path in hub.requests if path.endswith(".safetensors")]
