"""LoRAs of the transformer against diffusers' own loader with PEFT, per spelling that it takes."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import small
from tests.model.test_models import relative
from tests.weights import lora_files
from zimage_jax.model import dit
from zimage_jax.weights.adapters import Adapters
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.lora import open_lora

pytestmark = pytest.mark.live
CONFIG = small.CONFIGS["plain"]
TAKEN = [  # diffusers 0.42 raises on LoHa, drops dora_scale, and does not split `qkv.lora_A`
    *("diffusers", "diffusers, alpha in the header", "ai-toolkit", "DiffSynth"),
    *("musubi", "fused, kohya"),
]
GIVEN = small.inputs(CONFIG)


def theirs(loras: list[tuple], folder) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="the live comparison needs the reference extra")
    pytest.importorskip("peft", reason="diffusers loads LoRAs by PEFT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests import reference

        pipe = reference.pipeline(CONFIG, small.random_tensors(CONFIG))
        for index, _ in enumerate(loras):
            pipe.load_lora_weights(
                str(folder), weight_name=f"{index}.safetensors", adapter_name=f"of{index}"
            )
        names = [f"of{index}" for index in range(len(loras))]
        if names:
            pipe.set_adapters(names, adapter_weights=[weight for _, weight in loras])
        put = lambda a: torch.from_numpy(np.ascontiguousarray(a))  # noqa: E731
        features = [put(f[:n]) for f, n in zip(GIVEN["features"], GIVEN["lengths"], strict=True)]
        latents = put(GIVEN["latents"].transpose(0, 3, 1, 2))
        with torch.no_grad():
            found = pipe.transformer(
                [x[:, None] for x in latents], put(GIVEN["t"]), features, return_dict=False
            )[0]
        return torch.stack(found)[:, :, 0].permute(0, 2, 3, 1).numpy()


def ours(loras: list[tuple], folder, path) -> np.ndarray:
    checkpoint = Checkpoint(path)
    opened = [(open_lora(folder / f"{i}.safetensors", CONFIG), w) for i, (_, w) in enumerate(loras)]
    adapters = Adapters(checkpoint, tuple(opened))
    storage, beside = adapters.storage, adapters.arrays()
    units = {}
    for unit in storage.units("transformer"):
        arrays = checkpoint.read("transformer", unit)
        arrays |= beside.get(("transformer", unit), {})
        units[unit] = [jnp.asarray(arrays[p]) for p in storage.leaves("transformer", unit)]
    model, lengths = storage.assemble("transformer", units), GIVEN["lengths"].astype(np.int32)
    sides = dit.inputs(CONFIG.transformer, 6, 10, lengths, 64)
    context = jax.jit(dit.context)(model, jnp.asarray(GIVEN["features"]), lengths, sides.caption)
    time = dit.embed_time(model.stem, jnp.asarray(GIVEN["t"]))
    return np.asarray(
        jax.jit(dit.denoise)(model, jnp.asarray(GIVEN["latents"]), time, context, sides)
    )


def compare(loras: list[tuple], folder, path) -> None:
    for index, (made, _) in enumerate(loras):
        save_file(made.tensors, folder / f"{index}.safetensors", made.metadata)
    expected = theirs(loras, folder)
    assert relative(ours(loras, folder, path), expected) <= 1e-4
    assert relative(theirs([], folder), expected) > 1e-2


@pytest.mark.parametrize("spelling", TAKEN)
def test_a_spelling(spelling, tmp_path, native):
    compare([(lora_files.SPELLINGS[spelling](CONFIG), 0.8)], tmp_path, native("plain"))


def test_several(tmp_path, native):
    first = lora_files.SPELLINGS["diffusers"](CONFIG)
    second = lora_files.SPELLINGS["musubi"](CONFIG)
    third = lora_files.lora(CONFIG, lambda n: f"diffusion_model.{n}", rank=9, seed=3)
    compare([(first, 0.5), (second, 2.0), (third, -0.7)], tmp_path, native("plain"))
