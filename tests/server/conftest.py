"""One live server for each module of tests, with a random small model."""

import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the server needs the serve extra")

from scripts.bench.live_server import LiveServer
from tests.schedules import MODEL


@pytest.fixture(scope="session")
def start(native, cache_of_processes):
    """Starts a server."""

    def call(data, *arguments, **environment) -> LiveServer:
        own = {"JAX_COMPILATION_CACHE_DIR": cache_of_processes, **environment}
        # the page's import takes 5 seconds of a core: its tests ask for it
        given = "--model", native(MODEL), "--no-page", *arguments
        return LiveServer(data, *given, environment=own)

    return call


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    with start(tmp_path_factory.mktemp("server") / "data", "--queue", 20) as made:
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
