"""LoRAs of a folder that the server was started with: chosen by name, in each API."""

import os

import pytest
from openai import OpenAI
from safetensors.numpy import save_file

from tests import small
from tests.schedules import MODEL
from tests.weights import lora_files
from zimage_jax import UsageError, ZImage
from zimage_jax.server import loras as module
from zimage_jax.server.a1111 import Txt2Img
from zimage_jax.server.loras import LoraFolders
from zimage_jax.server.openai import Edit
from zimage_jax.server.order import Drawing, as_arguments, given, order

CONFIG = small.CONFIGS[MODEL]
JOB = {"prompt": "a red fox", "width": 64, "height": 48, "steps": 2, "seed": 3}
INK = [{"name": "ink", "weight": 0.5}]


@pytest.fixture
def loras(lora_folder) -> LoraFolders:
    return LoraFolders([lora_folder], CONFIG)


def test_the_listing_says_what_is_there(loras, lora_folder):
    ink, other = loras.describe()
    assert ink == {
        **{"name": "ink", "file": "ink.safetensors", "spelling": "diffusers (split)"},
        **{"kinds": {"LoRA": 56}, "ranks": ["4"], "trigger_words": ["drawn in ink"]},
    }
    assert other["error"].startswith("other.safetensors: not a LoRA of Z-Image")
    assert loras.chosen([*INK, {"name": "ink"}]) == [
        (str(lora_folder / "ink.safetensors"), 0.5),
        (str(lora_folder / "ink.safetensors"), 1.0),
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("../ink", "/etc/passwd", "ink.safetensors", "", ".", "..", "ink\0", "INK"),
        *("sub", "sub/", "sub/../ink", "./ink", "/ink", "sub//ink", "sub\\ink", "again/ink"),
        *("pipe", "~/ink", "a" * 1024),
    ],
)
def test_a_name_opens_nothing_but_what_is_listed(name, lora_folder, tmp_path):
    folder = tmp_path / "loras"
    (folder / "sub.safetensors").mkdir(parents=True)
    (folder / "sub").mkdir()
    for place in ("ink", "loras/ink", "loras/sub/ink"):
        os.link(lora_folder / "ink.safetensors", tmp_path / f"{place}.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "again").symlink_to(folder)
    (folder / "itself.safetensors").symlink_to("itself.safetensors")
    (folder / "\udcff.safetensors").touch()
    loras = LoraFolders([folder], CONFIG)
    assert list(loras.files()) == ["ink", "sub/ink"]
    for call in (loras.check, loras.chosen):
        with pytest.raises(UsageError, match="no such name") as raised:
            call([{"name": name}])
        assert str(tmp_path) not in str(raised.value)
        assert str(raised.value).isprintable()


def test_a_file_that_changed_is_read_again(tmp_path):
    def write(rank: int) -> None:
        made = lora_files.lora(CONFIG, lambda n: f"transformer.{n}", rank=rank)
        save_file(made.tensors, tmp_path / "a.safetensors")

    loras = LoraFolders([tmp_path], CONFIG)
    assert loras.describe() == []
    for rank in (2, 3):
        write(rank)
        assert loras.describe()[0]["ranks"] == [str(rank)]
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(UsageError, match="no such name: a;"):
        loras.check([{"name": "a"}])


def test_folders_below_are_listed_and_the_first_with_a_name_counts(tmp_path, monkeypatch):
    for place in (
        "a/ink",
        "b/ink",
        "b/styles/ink",
        "far/oil",
        "b" + "/x" * 8 + "/y",
        "b" + "/x" * 9 + "/z",
    ):
        file = tmp_path / f"{place}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no LoRA")
    (tmp_path / "a" / "styles").mkdir()
    (tmp_path / "b" / "styles" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "b")  # around in a circle
    loras = LoraFolders([tmp_path / "a", tmp_path / "b"], CONFIG)
    assert loras.files() == {
        "ink": tmp_path / "a" / "ink.safetensors",
        "styles/far/oil": tmp_path / "b" / "styles" / "far" / "oil.safetensors",
        "styles/ink": tmp_path / "b" / "styles" / "ink.safetensors",
        "x/" * 8 + "y": tmp_path / "b" / ("x/" * 8 + "y.safetensors"),
    }
    for row in loras.describe():
        assert row["file"] == f"{row['name']}.safetensors"
        assert str(tmp_path) not in row["error"]
    monkeypatch.setattr(module, "_MOST_FILES", 3)
    with pytest.raises(UsageError, match="over 3 files are in b: name a folder"):
        loras.files()
    with pytest.raises(UsageError, match="--loras: the folder cannot be read"):
        LoraFolders([tmp_path / "none"], CONFIG)


def test_an_order_names_loras_and_no_files(loras, lora_folder):
    body = Drawing(prompt="a", lora=INK)
    made = order(CONFIG, loras, "native", given(body))
    assert made.arguments["lora"] == INK
    paths = [(str(lora_folder / "ink.safetensors"), 0.5)]
    assert as_arguments(made.arguments, loras)["lora"] == paths
    assert made.to_plan(loras)["lora"] == paths


@pytest.mark.parametrize(
    ("folder", "name", "words"),
    [
        (False, "ink", "--loras FOLDER"),
        (True, "ank", "no such name: ank"),
        (True, "other", "not a LoRA"),
    ],
)
def test_an_order_is_refused_before_it_is_stored(folder, name, words, lora_folder):
    loras = LoraFolders([lora_folder] if folder else [], CONFIG)
    with pytest.raises(UsageError, match=words) as raised:
        order(CONFIG, loras, "native", {"prompt": "a", "lora": [{"name": name}]})
    assert str(lora_folder) not in str(raised.value)


@pytest.mark.parametrize(
    "lora",
    [
        *(["ink"], [["ink", 1]], [{"path": "ink"}], [{"name": "ink", "weight": "1"}]),
        *([{"name": "ink", "weight": 101}], [{"name": "ink", "weight": float("nan")}], INK * 17),
    ],
)
def test_a_body_has_names_and_weights(lora):
    with pytest.raises(ValueError, match="lora"):
        Drawing(prompt="a", lora=lora)


@pytest.mark.parametrize(
    ("prompt", "left", "lora"),
    [
        ("a fox <lora:ink:0.5>", "a fox", INK),
        ("<lora:a b.c-1> a fox", "a fox", [{"name": "a b.c-1", "weight": 1.0}]),
        ("a <lora:styles/ink:0.5>", "a", [{"name": "styles/ink", "weight": 0.5}]),
        ("<lora:ink:.5>a <lora:b:-1> c", "a  c", [*INK, {"name": "b", "weight": -1.0}]),
        (" a < b > c <lora> ", " a < b > c <lora> ", []),
    ],
)
def test_tags_in_a_prompt_of_a1111(prompt, left, lora):
    found = Txt2Img(prompt=prompt).arguments()
    assert (found["prompt"], found["lora"]) == (left, lora or None)
    found = Txt2Img(prompt=prompt, lora=INK).arguments()
    assert found["lora"] == [*lora, *INK]


@pytest.mark.parametrize(
    "tag", ["<lora:ink:x>", "<lora:ink:1:1>", "<lora:ink:te=1>", "<lora:ink:1e9>", "<lora:ink:nan>"]
)
def test_a_tag_that_says_something_else_is_refused(tag):
    with pytest.raises(UsageError, match="expected <lora:NAME> or <lora:NAME:WEIGHT>"):
        Txt2Img(prompt=f"a {tag}").arguments()
    with pytest.raises(UsageError, match="at most 16"):
        Txt2Img(prompt="<lora:ink>" * 17).arguments()


def test_a_form_of_openai_has_them_as_json():
    body = Edit.model_validate(
        {"prompt": "a", "lora": '[{"name": "ink", "weight": 0.5}]'}, strict=False
    )
    assert body.arguments()["lora"] == INK


# -- a live server ---------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_each_api_draws_what_generate_draws(server, native, lora_folder):
    lora = [(lora_folder / "ink.safetensors", 0.5)]
    expected = ZImage.load(native(MODEL)).generate(**JOB, lora=lora).report["latents_sha256"]
    server.wait(server.post("/jobs", JOB | {"lora": INK})["id"])
    size = {name: JOB[name] for name in ("width", "height", "steps", "seed")}
    server.post("/sdapi/v1/txt2img", size | {"prompt": "a red fox <lora:ink:0.5>"})
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        own = {"seed": 3, "num_inference_steps": 2, "lora": INK}
        client.images.generate(prompt="a red fox", size="64x48", extra_body=own)
    jobs = server.get("/jobs?limit=3")["jobs"]
    assert {job["origin"] for job in jobs} == {"native", "a1111", "openai"}
    for job in jobs:
        assert job["arguments"]["lora"] == INK
        assert job["pictures"][0]["latents_sha256"] == expected
    plain = server.wait(server.post("/jobs", JOB)["id"])
    assert plain["pictures"][0]["latents_sha256"] != expected


@pytest.mark.exhaustive
def test_lists_name_no_folder(server, lora_folder):
    ink, other = server.get("/loras")["loras"]
    assert (ink["name"], ink["trigger_words"]) == ("ink", ["drawn in ink"])
    assert "error" in other
    (row,) = server.get("/sdapi/v1/loras")
    assert (row["name"], row["path"]) == ("ink", "ink.safetensors")
    assert server.post("/sdapi/v1/refresh-loras", {}) == {}
    for path in ("/loras", "/sdapi/v1/loras"):
        assert str(lora_folder).encode() not in server.ask("GET", path)[2]
    for path, body in (
        ("/jobs", JOB | {"lora": [{"name": "../ink"}]}),
        ("/plan", JOB | {"lora": [{"name": "other"}]}),
        ("/sdapi/v1/txt2img", {"prompt": "<lora:/etc/passwd>"}),
    ):
        status, _, answer = server.ask("POST", path, body)
        assert status == 400
        assert str(lora_folder).encode() not in answer
    assert server.ask("POST", "/plan", JOB | {"lora": INK})[0] == 200


@pytest.mark.long
def test_a_job_whose_lora_has_gone_fails_and_the_next_is_drawn(start, lora_folder, tmp_path):
    folder = tmp_path / "loras"
    folder.mkdir()
    file = folder / "ink.safetensors"
    file.write_bytes((lora_folder / "ink.safetensors").read_bytes())
    with start(tmp_path / "data", "--loras", folder) as server:
        gone = server.post("/jobs", JOB | {"lora": INK, "count": 10, "steps": 50})["id"]
        server.kill()
        file.unlink()
        server.start()
        failed = server.wait(gone)
        assert (failed["state"], failed["error"]["code"]) == ("failed", "invalid_request")
        assert "no such name: ink" in failed["error"]["message"]
        assert server.wait(server.post("/jobs", JOB)["id"])["state"] == "done"
