"""The nodes in a real ComfyUI."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests import small
from tests.comfyui import comfy, workflows
from tests.comfyui.workflows import node, report, text_to_image, with_pipe
from zimage_jax import ZImage
from zimage_jax.comfyui.__main__ import NODES
from zimage_jax.model.config import TURBO, ControlConfig
from zimage_jax.weights.formats import uniform
from zimage_jax.weights.writer import save

pytestmark = pytest.mark.long
NAMES = ["Loader", "BlockChunk", "Lora", "Control", "TextEncoder", "TextRefiner", "Scheduler"]
NAMES = [f"ZImageTurbo{name}" for name in [*NAMES, "Sampler", "BatchProcessor"]]


def test_nodes_register_without_a_warning(comfyui):
    known = comfyui.get("/object_info")
    assert set(NAMES) <= known.keys()
    lines = [line for line in comfyui.log.read_text().splitlines() if "zimage_jax" in line]
    assert not [line for line in lines if any(w in line for w in ("WARN", "FAILED", "Error"))]
    replaced = comfyui.get("/node_replacements")
    assert "ZImageTurboModelLoader" in replaced


GENERATE = """
import sys, numpy as np
from zimage_jax import ZImage
control, own = eval(sys.argv[2])
job = dict(prompt="a red circle", seed=7, width=64, height=64, steps=4) | own
drawn = ZImage.load(control=control).generate(**job)
np.savez(sys.argv[1], latents=drawn.latents, image=drawn.pictures[0].pixels)
print(drawn.report["latents_sha256"])
"""


def generated(tmp_path, control=None, **own) -> str:
    """latents_sha256 of generate, in a process of its own: the tests compile without optimisation,
    which changes last bits. one.npz in `tmp_path` has what it drew."""
    command = [sys.executable, "-c", GENERATE, str(tmp_path / "one.npz"), repr((control, own))]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return ran.stdout.strip()


def test_a_picture_is_generates(comfyui, tmp_path):
    prompt = text_to_image()
    prompt["7"] = node("TestsSaveTensors", name="one.safetensors", latent=["4", 1], image=["4", 0])
    assert report(comfyui.run(prompt))["latents_sha256"] == generated(tmp_path)
    ours, saved = (
        np.load(tmp_path / "one.npz"),
        load_file(comfyui.base / "output" / "one.safetensors"),
    )
    vae = ZImage.load().config.vae
    raw = ours["latents"] / vae.scaling_factor + vae.shift_factor
    off = np.abs(saved["latents"] - raw.transpose(0, 3, 1, 2)).max()
    print(f"LATENT differs by {off:.2e}")
    assert off < 1e-6
    assert np.abs(saved["image"][0] * 255 - ours["image"]).max() <= 0.5 + 1e-3


ARROW = NODES.parents[1] / "assets" / "tiny-arrow.safetensors"


def test_loras_of_comfyuis_folder_are_generates(comfyui, tmp_path):
    """Two in a row, one in a folder below; the text encoder's part counts too."""
    folder = comfyui.base / "models" / "loras" / "styles"
    folder.mkdir(parents=True)
    arguments = {"prompt": "a red arrow", "lora": [(str(ARROW), 0.75), (str(ARROW), -0.25)]}
    expected = generated(tmp_path, **arguments)
    plain = generated(tmp_path, prompt="a red arrow")
    for place in (folder, folder.parent):
        shutil.copy(ARROW, place)
    first = node("ZImageTurboLora", lora="tiny-arrow.safetensors", weight=0.75)
    second = node("ZImageTurboLora", lora="styles/tiny-arrow.safetensors", weight=-0.25)
    prompt = with_pipe(text_to_image("a red arrow"), first, second)
    assert report(comfyui.run(prompt))["latents_sha256"] == expected != plain
    (pid,) = comfyui.engine_pids()
    assert report(comfyui.run(text_to_image("a red arrow")))["latents_sha256"] == plain
    assert comfyui.engine_pids() == [pid]


def test_a_lora_that_has_changed_is_drawn_again(comfyui, listener, request):
    file = comfyui.base / "models" / "loras" / "mine.safetensors"
    shutil.copy(ARROW, file)
    prompt = with_pipe(
        text_to_image("a red arrow"), node("ZImageTurboLora", lora=file.name, weight=1.0)
    )
    drawn = []
    for is_cached in (False, True, False):
        comfyui.queue(prompt, request.node.name)
        found = listener.until("execution_success")
        (cached,) = texts(found, "execution_cached")
        assert ("4" in cached["nodes"]) == is_cached
        outputs = [of["output"] for of in texts(found, "executed") if of["node"] == "6"]
        drawn.append(json.loads(outputs[0]["text"][0])["latents_sha256"])
        if is_cached:
            tensors = load_file(ARROW)
            save_file({name: 2 * array for name, array in tensors.items()}, file)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_controlnet_of_comfyuis_folder_is_generates(comfyui, tmp_path):
    """Random ones, since the tiny model has none."""
    config = ZImage.load().config
    folder = comfyui.base / "models" / "model_patches"
    folder.mkdir()
    for seed, name in enumerate(("first", "second")):
        tensors = small.control_tensors(config, ControlConfig(2, 33, "control_noise_refiner"), seed)
        save_file(tensors, folder / f"{name}.safetensors")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(picture).save(comfyui.base / "input" / "edges.png")

    def drawn(name: str | None, **own) -> tuple[str, list[int]]:
        prompt = text_to_image(**own)
        if name is not None:
            inputs = {"control_net": f"{name}.safetensors", "image": ["8", 0], "scale": 0.5}
            prompt = with_pipe(prompt, node("ZImageTurboControl", **inputs))
            prompt["8"] = node("LoadImage", image="edges.png")
        return report(comfyui.run(prompt))["latents_sha256"], comfyui.engine_pids()

    edges = {"control_image": str(comfyui.base / "input" / "edges.png"), "control_scale": 0.5}
    shas = {
        name: generated(tmp_path, str(folder / f"{name}.safetensors"), **edges)
        for name in ("first", "second")
    }
    plain = generated(tmp_path)
    assert len({plain, *shas.values()}) == 3
    sha, first = drawn("first")
    assert sha == shas["first"]
    sha, pids = drawn(None)
    assert (sha, pids) == (plain, first)  # drawn by the same engine
    sha, second = drawn("second")
    assert sha == shas["second"]
    assert second != first
    # a batch of control images has a picture for each, and no other number of pictures
    inputs = {"control_net": "second.safetensors", "image": ["9", 0], "scale": 0.5}
    prompt = with_pipe(text_to_image(), node("ZImageTurboControl", **inputs))
    prompt["8"] = node("LoadImage", image="edges.png")
    prompt["9"] = node("RepeatImageBatch", image=["8", 0], amount=2)
    reports = report(comfyui.run(prompt))
    assert [each["seed"] for each in reports] == [7, 8]
    assert reports[0]["latents_sha256"] == shas["second"]
    prompt["4"]["inputs"]["latent_image"] = ["10", 0]
    prompt["10"] = node("EmptySD3LatentImage", width=64, height=64, batch_size=3)
    kind, facts = comfyui.ended(comfyui.queue(prompt))["status"]["messages"][-1]
    assert kind == "execution_error"
    assert "2 images for 3 pictures: expected one, or one for each" in facts["exception_message"]


def texts(messages: list, kind: str) -> list[dict]:
    return [of["data"] for of in messages if isinstance(of, dict) and of["type"] == kind]


def test_previews_arrive(comfyui, listener, request):
    comfyui.queue(text_to_image(seed=8), request.node.name)
    found = listener.until("execution_success")
    previews = [of for of in found if isinstance(of, tuple) and of[0] == 1]
    assert len(previews) == 4
    assert Image.open(io.BytesIO(previews[0][1][4:])).size[0] > 0
    lines = [of[1] for of in found if isinstance(of, tuple) and of[0] == 3]
    assert any(b"[Chunk Mode: " in line and b"predicted peak" in line for line in lines)
    assert b"drawn: peak" in lines[-1]
    assert [of["value"] for of in texts(found, "progress")][-4:] == [1, 2, 3, 4]


def test_nothing_is_drawn_twice_but_another_seed_is(comfyui, listener, request):
    for seed, is_cached in ((9, False), (9, True), (10, False)):
        comfyui.queue(text_to_image(seed=seed), request.node.name)
        found = listener.until("execution_success")
        (cached,) = texts(found, "execution_cached")
        assert ("4" in cached["nodes"]) == is_cached


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 100}, "width 100: expected a multiple of 16, as 96"),
        ({"loader": {"text_encoder_offload": True, "text_branch_always_loaded": True}}, "turn one"),
        ({"loader": {"chunk_count": 0}}, "chunk_count"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_queue(comfyui, change, message):
    status, data = comfyui.request("/prompt", {"prompt": text_to_image(**change)})
    assert status == 400
    assert message in data.decode()


def test_an_error_is_one_sentence_on_the_node(comfyui):
    prompt = text_to_image(pipe=["7", 0])
    prompt["7"] = node("ZImageTurboBlockChunk", pipe=["1", 0], chunk=99, mode="resident")
    kind, facts = comfyui.ended(comfyui.queue(prompt))["status"]["messages"][-1]
    assert kind == "execution_error"
    assert facts["node_type"] == "ZImageTurboSampler"
    assert "chunk 99 does not exist" in facts["exception_message"]
    assert len(facts["exception_message"].strip().splitlines()) == 1


LONG = {"schedule": {"steps": 100}, "width": 256, "height": 256}


def test_interrupt_interrupts(comfyui, listener, request):
    number = comfyui.queue(text_to_image(seed=11, **LONG), request.node.name)
    while not (isinstance(of := listener.messages.get(timeout=120), tuple) and of[0] == 1):
        pass
    began = time.monotonic()
    comfyui.request("/interrupt", {"prompt_id": number})
    listener.until("execution_interrupted", 60)
    print(f"interrupted after {time.monotonic() - began:.2f} s")
    assert comfyui.run(text_to_image(seed=12))


def test_the_next_prompt_works_after_the_engine_was_killed(comfyui, listener, request):
    number = comfyui.queue(text_to_image(seed=13, **LONG), request.node.name)
    while not (isinstance(of := listener.messages.get(timeout=120), tuple) and of[0] == 1):
        pass
    (pid,) = comfyui.engine_pids()
    os.kill(pid, signal.SIGKILL)
    kind, facts = comfyui.ended(number)["status"]["messages"][-1]
    assert kind == "execution_error"
    assert "the engine ended in the middle of a job" in facts["exception_message"]
    assert "SIGKILL" in facts["exception_message"]
    assert comfyui.run(text_to_image(seed=14))
    assert comfyui.engine_pids() != [pid]


def test_unload_models_ends_the_engine_and_a_smaller_cap_starts_it_again(comfyui):
    comfyui.run(text_to_image(seed=15, loader={"max_vram": 2.0}))
    (first,) = comfyui.engine_pids()
    comfyui.run(text_to_image(seed=16, loader={"max_vram": 3.0, "chunk_count": 1}))
    assert comfyui.engine_pids() == [first]  # more, and other chunks, are live
    comfyui.run(text_to_image(seed=17, loader={"max_vram": 1.0}))
    (second,) = comfyui.engine_pids()
    assert second != first
    comfyui.request("/free", {"unload_models": True})
    until = time.monotonic() + 30
    while comfyui.engine_pids() and time.monotonic() < until:
        time.sleep(0.1)
    assert comfyui.engine_pids() == []
    assert comfyui.run(text_to_image(seed=18))


def test_twenty_prompts_leave_memory_flat(comfyui):
    for seed in range(100, 105):
        comfyui.run(text_to_image(seed=seed))
    before = comfy.resident(comfyui.process.pid)
    for seed in range(200, 220):
        comfyui.run(text_to_image(seed=seed))
    grown = comfy.resident(comfyui.process.pid) - before
    print(f"twenty prompts: {before / 2**20:.0f} MiB before, {grown / 2**20:+.1f} MiB")
    assert grown < 64 * 2**20


@pytest.fixture(scope="module")
def flux_vae(comfyui, tmp_path_factory):
    """A random model whose VAE has the published widths: ours in models/zimage_jax, and its VAE in
    models/vae for ComfyUI's own class, which has no other widths."""
    config = dataclasses.replace(small.CONFIGS["plain"], vae=TURBO.vae)
    weights = small.random_tensors(config)
    folder, models = tmp_path_factory.mktemp("flux_vae"), comfyui.base / "models"
    made = {c: small.our_model(c, config, weights[c]) for c in small.MODELS}
    vocabulary = small.tokenizer().to_str().encode()
    native = save(folder / "float32", uniform(config, "float32"), made, vocabulary, {})
    rounded = models / "zimage_jax" / "flux_vae"
    rounded.parent.mkdir(exist_ok=True)
    for words in (
        [native, rounded, "--quiet"],
        ["export", rounded, folder / "files", "--layout", "comfyui", "--quiet"],
    ):
        command = [sys.executable, "-m", "checkpoints_convert", *map(str, words)]
        subprocess.run(command, check=True)
    (models / "vae").mkdir(exist_ok=True)
    (file,) = (folder / "files").rglob("vae/*.safetensors")
    shutil.copy(file, models / "vae" / "ae.safetensors")


def test_comfyuis_vae_decodes_our_latents_and_encodes_for_us(comfyui, flux_vae):
    prompt = text_to_image(seed=21, loader={"model": "zimage_jax/flux_vae"})
    again = prompt["4"]["inputs"] | {"latent_image": ["11", 0], "strength": 0.0}
    prompt |= {
        "7": node("VAELoader", vae_name="ae.safetensors"),
        "8": node("VAEDecode", samples=["4", 1], vae=["7", 0]),
        "9": node("TestsSaveTensors", name="theirs.safetensors", image=["8", 0]),
        "10": node("TestsSaveTensors", name="ours.safetensors", image=["4", 0]),
        "11": node("VAEEncode", pixels=["4", 0], vae=["7", 0]),
        "12": node("ZImageTurboSampler", **again),
        "13": node("VAEDecode", samples=["11", 0], vae=["7", 0]),
        "14": node("TestsSaveTensors", name="ours_again.safetensors", image=["12", 0]),
        "15": node("TestsSaveTensors", name="theirs_again.safetensors", image=["13", 0]),
    }
    comfyui.run(prompt)
    found = {
        name: load_file(comfyui.base / "output" / f"{name}.safetensors")["image"]
        for name in ("ours", "theirs", "ours_again", "theirs_again")
    }
    for name in ("", "_again"):
        off = np.abs(found["ours" + name] - found["theirs" + name]).max()
        print(f"VAEDecode{name} differs by {off:.2e}")
        assert off < 1e-3
    assert np.ptp(found["ours"]) > 0.1


def test_a_mask_keeps_what_is_black_in_it(comfyui):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(comfyui.base / "input" / "red.png")
    prompt = text_to_image(seed=22, image=["7", 0], mask=["8", 0])
    prompt |= {
        "7": node("LoadImage", image="red.png"),
        "8": node(
            "MaskComposite", destination=["9", 0], source=["10", 0], x=0, y=0, operation="add"
        ),
        "9": node("SolidMask", value=0.0, width=64, height=64),
        "10": node("SolidMask", value=1.0, width=32, height=64),
        "11": node("TestsSaveTensors", name="masked.safetensors", image=["4", 0]),
    }
    comfyui.run(prompt)
    (image,) = load_file(comfyui.base / "output" / "masked.safetensors")["image"]
    assert np.abs(image[:, 32:] * 255 - (200, 30, 30)).max() < 1
    assert np.abs(image[:, :32] * 255 - (200, 30, 30)).max() > 20


EXAMPLES = sorted(path.stem for path in workflows.EXAMPLES.glob("*.json"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_workflows_run(comfyui, flux_vae, name):
    """With the tiny model; where they have a VAE file, with the one whose VAE that is."""
    Image.new("RGB", (96, 64), (200, 30, 30)).save(comfyui.base / "input" / "example.png")
    prompt = workflows.api(workflows.EXAMPLES / f"{name}.json", comfyui.get("/object_info"))
    kinds = {each["class_type"] for each in prompt.values()}
    for each in prompt.values():
        size = {name: 64 for name in ("width", "height") if name in each["inputs"]}
        each["inputs"] |= size
        if each["class_type"] == "ZImageTurboLoader" and "VAELoader" in kinds:
            each["inputs"]["model"] = "zimage_jax/flux_vae"
    outputs = comfyui.run(prompt)
    pictures = [of for out in outputs.values() for of in out.get("images", [])]
    assert len(pictures) == (4 if name == "batch" else 1)
    with Image.open(comfyui.file(pictures[0])) as image:
        assert image.size == (64, 64)
        assert "prompt" in image.info  # dropped on the page it is the workflow again
