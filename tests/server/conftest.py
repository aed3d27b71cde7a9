"""One live server for each module of tests, with a random small model."""

import io

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

pytest.importorskip("fastapi", reason="the server needs the serve extra")

from scripts.bench.live_server import LiveServer
from tests import small
from tests.schedules import MODEL
from tests.weights import lora_files


@pytest.fixture(scope="session")
def start(native, cache_of_processes):
    """Starts a server."""

    def call(data, *arguments, **environment) -> LiveServer:
        own = {"JAX_COMPILATION_CACHE_DIR": cache_of_processes, **environment}
        # the page's import takes 5 seconds of a core: its tests ask for it
        given = "--model", native(MODEL), "--no-page", *arguments
        return LiveServer(data, *given, environment=own)

    return call


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory):
    """A LoRA, ink, and a file that is none."""
    folder = tmp_path_factory.mktemp("loras")
    made = lora_files.lora(small.CONFIGS[MODEL], lambda n: f"transformer.{n}")
    words = {"modelspec.trigger_phrase": "drawn in ink"}
    save_file(made.tensors, folder / "ink.safetensors", words)
    save_file({"a": np.ones(1, np.float32)}, folder / "other.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(start, lora_folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("server") / "data"
    with start(data, "--queue", 20, "--loras", lora_folder) as made:
        yield made


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A PNG, red above and blue below."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :, 0], pixels[24:, :, 2] = 200, 200
    return png(pixels)


def png(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
