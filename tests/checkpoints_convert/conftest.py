"""The published folder of a small model."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tests.checkpoints_convert.local_hub import DATA, NAME, LocalHub
from tests.checkpoints_convert.published import STEMS, published_like, write_configs


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A diffusers folder with the DiT in three shards."""
    path = tmp_path_factory.mktemp("source") / "published"
    write_configs(path)
    for component, stem in STEMS.items():
        tensors = published_like(component)
        if component != "transformer":
            save_file(tensors, path / component / f"{stem}.safetensors")
            continue
        index = {}
        for k in range(3):
            shard = f"{stem}-{k + 1:05d}-of-00003.safetensors"
            part = {n: tensors[n] for n in list(tensors)[k::3]}
            save_file(part, path / component / shard)
            index |= dict.fromkeys(part, shard)
        (path / component / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"weight_map": index})
        )
    return path


@pytest.fixture
def folder(published, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(published, tmp_path / "published")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No hub, token or proxy of the machine."""
    names = [n for n in os.environ if n.upper().endswith("_PROXY")]
    for name in (*names, "HF_ENDPOINT", "HF_TOKEN", "MODELSCOPE_DOMAIN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(monkeypatch):
    made = LocalHub({NAME: DATA, "config.json": b"{}", "empty.json": b""})
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", made.url)
    yield made
    made.close()
