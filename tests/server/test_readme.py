"""The page about the server: what it shows is run."""

import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.exhaustive  # a server of its own

PAGE = Path(__file__).parent.parent.parent / "zimage_jax" / "server" / "README.md"


def test_every_curl_line_of_the_page_works(server, tmp_path):
    text = PAGE.read_text("utf-8")
    blocks = [
        block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "curl" in block
    ]
    lines = "\n".join(blocks).replace("http://127.0.0.1:7860", server.url)
    assert lines.count("curl ") == text.count("curl ") == 22
    command = ["bash", "-euxo", "pipefail", "-c", lines]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for word in (
        "event: done",
        '"fits":true',
        "image_generation.completed",
        '"state":"removed"',
        "zimage_jobs_total",
    ):
        assert word in ended.stdout
    for name in ("circle.png", "circle.jpeg"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (64, 64)


def test_every_path_is_on_the_page(server):
    text = PAGE.read_text("utf-8")
    for path in server.get("/openapi.json")["paths"]:
        name = path.split("/{")[0].removeprefix("/sdapi/v1/").removeprefix("/v1/images/")
        assert name in text, path
