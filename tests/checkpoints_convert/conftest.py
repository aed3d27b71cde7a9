"""The published folder of a small model."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import save_file

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
