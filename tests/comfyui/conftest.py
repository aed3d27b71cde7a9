"""A real ComfyUI, where ZIMAGE_COMFYUI names its folder (and ZIMAGE_COMFYUI_PYTHON its Python)."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.comfyui.comfy import ComfyUI, Listener, command_line

ROOT = Path(__file__).parents[2]
MINE = Path(__file__).parent / "custom_node"


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory, cache_of_processes):
    folder = os.environ.get("ZIMAGE_COMFYUI")
    if not folder:
        pytest.skip("ZIMAGE_COMFYUI is unset: expected the folder of a ComfyUI")
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "zimage_tests").symlink_to(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", cache_of_processes)
        command = [sys.executable, "-m", "zimage_jax.comfyui", "install", str(base)]
        subprocess.run(command, check=True, cwd=ROOT)
        python = os.environ.get("ZIMAGE_COMFYUI_PYTHON", sys.executable)
        made = ComfyUI(Path(folder), python, base)
    try:
        made.wait()
        yield made
        engines = made.engine_pids()
    finally:
        made.close()
    until = time.monotonic() + 30
    while any(map(command_line, engines)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(command_line, engines)), "the engine outlives ComfyUI"


@pytest.fixture
def listener(comfyui, request):
    made = Listener(comfyui, request.node.name)
    yield made
    made.close()
