"""CONDITIONING between our nodes and ComfyUI's own text encoder and sampler."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import small
from tests.comfyui.workflows import node, text_to_image
from zimage_jax.weights.formats import uniform
from zimage_jax.weights.writer import save

pytestmark = pytest.mark.long
NAME = "small_widths"
FILE = f"{NAME}.safetensors"
# NextDiT's time embedding has the published width, 1024, from this dim on; Qwen's own vocabulary
CONFIG = small.small_config(
    dim=1024,
    heads=8,
    axes=(32, 48, 48),
    features=64,
    text_heads=(4, 2),
    vocab=151936,
    channels=(16, 16, 32, 32),
)
OURS, THEIRS = ["3", 0], ["21", 0]  # CONDITIONING
TOKENIZER = """
import sys
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1]).backend_tokenizer.save(sys.argv[2])
"""  # as nodes/host.py makes it of ComfyUI's files


@pytest.fixture(scope="module")
def widths(comfyui, tmp_path_factory):
    """One small model, whose numbers are bfloat16's: for us in float32, for ComfyUI in its layout.
    On a CPU it computes in float32 too."""
    folder = tmp_path_factory.mktemp(NAME)
    source = Path(os.environ["ZIMAGE_COMFYUI"]) / "comfy" / "text_encoders" / "qwen25_tokenizer"
    python = os.environ.get("ZIMAGE_COMFYUI_PYTHON", sys.executable)
    vocabulary = folder / "tokenizer.json"
    subprocess.run([python, "-c", TOKENIZER, str(source), str(vocabulary)], check=True)
    made = {}
    for component, tensors in small.random_tensors(CONFIG).items():
        rounded = {n: a.astype(ml_dtypes.bfloat16).astype(np.float32) for n, a in tensors.items()}
        made[component] = small.our_model(component, CONFIG, rounded)
    models = comfyui.base / "models"
    native = models / "zimage_jax" / NAME
    native.parent.mkdir(exist_ok=True)
    save(native, uniform(CONFIG, "float32"), made, vocabulary.read_bytes(), {})
    words = [native, folder / "files", "--layout", "comfyui", "--quiet"]
    command = [sys.executable, "-m", "checkpoints_convert", "export", *map(str, words)]
    subprocess.run(command, check=True)
    for kind in ("diffusion_models", "text_encoders"):
        (file,) = (folder / "files").rglob(f"{kind}/*.safetensors")
        (models / kind).mkdir(exist_ok=True)
        shutil.move(file, models / kind / FILE)


def graph(text: str, **sampler) -> dict:
    """Our nodes, and 20 ComfyUI's loaders, 21 its CLIPTextEncode."""
    config = json.dumps(dataclasses.asdict(CONFIG))
    return text_to_image(text, loader={"model": f"zimage_jax/{NAME}"}, **sampler) | {
        "20": node("TestsLoadSmall", name=FILE, config=config),
        "21": node("CLIPTextEncode", text=text, clip=["20", 1]),
    }


def saved(comfyui, prompt: dict, **tensors: list) -> dict[str, np.ndarray]:
    """Run a prompt; what came out of the nodes' outputs `tensors`, whose names begin with their
    kind."""
    for number, (name, output) in enumerate(tensors.items(), 100):
        given = {name.partition("_")[0]: output, "name": f"{name}.safetensors"}
        prompt[str(number)] = node("TestsSaveTensors", **given)
    comfyui.run(prompt)
    files = {name: comfyui.base / "output" / f"{name}.safetensors" for name in tensors}
    return {name: next(iter(load_file(file).values())) for name, file in files.items()}


def off(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The difference's norm, of that of `theirs`."""
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


TEXTS = {
    "English": "a red circle, left of a big blue square",
    "Chinese": "画在白色背景上的红色圆形 🎨，e\u0301",
    "brackets": 'a (red:1.3) [circle] {one|two} and a "sign"',
    "backslashes": "a \\(red\\) circle",
    "spaces": "  two  spaces\n\n\tand lines \n",
    "empty": "",
    "long": "a small red circle above a green star, " * 45,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_features_are_those_of_cliptextencode(comfyui, widths, kind):
    prompt = graph(TEXTS[kind])
    del prompt["4"], prompt["5"], prompt["6"]
    found = saved(comfyui, prompt, conditioning_ours=OURS, conditioning_theirs=THEIRS)
    ours, theirs = found["conditioning_ours"], found["conditioning_theirs"]
    print(f"{kind}: {theirs.shape[1]} tokens, features differ by {off(ours, theirs):.1e}")
    assert off(ours, theirs) <= 1e-4


@pytest.mark.parametrize(
    ("kind", "cfg", "size"),
    [("English", 1.0, (64, 64)), ("long", 3.0, (96, 160))],
    ids=["turbo", "guided"],
)
def test_either_conditioning_drives_either_sampler(comfyui, widths, kind, cfg, size):
    width, height = size
    prompt = graph(TEXTS[kind], cfg=cfg, width=width, height=height, vae_decode="off")
    del prompt["5"]
    theirs = {"seed": 7, "steps": 4, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple"}
    prompt |= {
        "22": node("ModelSamplingAuraFlow", model=["20", 0], shift=3.0),
        "23": node("EmptySD3LatentImage", width=width, height=height, batch_size=1),
        "24": node("CLIPTextEncode", text="blurry", clip=["20", 1]),
        "25": node("ZImageTurboTextEncoder", **prompt["3"]["inputs"] | {"prompt": "blurry"}),
    }
    latents = {}
    pairs = (("ours", OURS, ["25", 0]), ("theirs", THEIRS, ["24", 0]))
    for whose, positive, negative in (*pairs, ("other", ["24", 0], ["24", 0])):
        of_ours = {"positive": positive} | ({"negative": negative} if cfg > 1 else {})
        prompt[f"ours {whose}"] = node("ZImageTurboSampler", **prompt["4"]["inputs"] | of_ours)
        prompt[f"theirs {whose}"] = node(
            "KSampler",
            **{"model": ["22", 0], "positive": positive, "negative": negative},
            **{"latent_image": ["23", 0], "denoise": 1.0, **theirs},
        )
        latents[f"latent_sampler_{whose}"] = [f"ours {whose}", 1]
        latents[f"latent_ksampler_{whose}"] = [f"theirs {whose}", 0]
    prompt["6"]["inputs"]["source"] = ["ours ours", 2]
    del prompt["4"]
    found = saved(comfyui, prompt, **latents)
    expected = found["latent_ksampler_theirs"]
    others = [found.pop(name) for name in list(found) if name.endswith("other")]
    assert min(off(other, expected) for other in others) > 1e-2  # the text is seen in the latents
    for name, latent in found.items():
        print(f"{name} differs from KSampler and CLIPTextEncode by {off(latent, expected):.1e}")
        assert off(latent, expected) <= 1e-3
