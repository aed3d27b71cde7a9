"""The ControlNets against diffusers' `ZImageControlNetModel`, on small random models: from goldens
always, live where torch is."""

import warnings
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small
from tests.conftest import GOLDENS
from tests.model.test_models import inputs, relative
from tests.schedules import every
from tests.small import CONTROLLED, CONTROLS
from zimage_jax.errors import ConfigError
from zimage_jax.model import control, dit
from zimage_jax.model.config import TURBO, ControlConfig
from zimage_jax.model.layers import named_arrays
from zimage_jax.weights import names as rules


@pytest.fixture(scope="module", params=["golden", pytest.param("live", marks=pytest.mark.live)])
def expected(request):
    if request.param == "golden":
        return np.load(GOLDENS / "control.npz")
    pytest.importorskip("torch", reason="the live comparison needs the reference extra")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests import reference

        return reference.controlled()


@cache
def velocity(name: str, dtype=jnp.float32, scale: float | None = None) -> np.ndarray:
    config, of, given = CONTROLLED, CONTROLS[name], inputs(CONTROLLED)
    model = small.our_controlled(config, of, dtype)
    lengths = given["lengths"].astype(np.int32)
    latents, image, own = small.control_inputs(config, of)
    sides = dit.inputs(config.transformer, *latents.shape[1:3], lengths, 64)

    @jax.jit
    def run(model, latents, image, features, lengths, sides, t, scale):
        context = dit.context(model, features.astype(dtype), lengths, sides.caption)
        before = model.control_before if of.refiner == "control_layers" else None
        tokens = control.embed(model.control_embedder, model.stem, before, image, dtype)
        time = dit.embed_time(model.stem, t)
        parts = config.transformer, of
        return control.denoise(model, latents, time, context, sides, tokens, scale, parts)

    features, scale = given["features"], own if scale is None else scale
    arrays = latents, image[..., :16], features, lengths, sides, given["t"], np.float32(scale)
    return np.asarray(run(model, *arrays))


@pytest.mark.parametrize("name", every(CONTROLS, ["union 2.1"]))
def test_velocity_agrees_with_diffusers(name, expected):
    assert relative(velocity(name), expected[name]) <= 1e-4


@pytest.mark.parametrize("name", every(CONTROLS, []))
def test_bfloat16_is_as_exact_as_diffusers(name, expected):
    exact = expected[name]
    own = relative(velocity(name, jnp.bfloat16), exact)
    assert own <= 1.1 * relative(expected[f"{name}_bf16"], exact)


@pytest.mark.exhaustive
def test_float16_is_nearer_than_bfloat16(expected):
    name = "union 2.1"
    errors = [relative(velocity(name, d), expected[name]) for d in (jnp.float16, jnp.bfloat16)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.exhaustive
def test_scale_0_is_the_plain_model():
    given = inputs(CONTROLLED)
    model = small.our_model(
        "transformer", CONTROLLED, small.random_tensors(CONTROLLED)["transformer"]
    )
    lengths = given["lengths"].astype(np.int32)
    sides = dit.inputs(CONTROLLED.transformer, 6, 10, lengths, 64)

    @jax.jit
    def plain(model, latents, features, lengths, sides, t):
        context = dit.context(model, features, lengths, sides.caption)
        return dit.denoise(model, latents, dit.embed_time(model.stem, t), context, sides)

    arrays = given["latents"], given["features"], lengths, sides, given["t"]
    off = plain(model, *arrays)
    assert relative(velocity("union 2.1", scale=0.0), off) <= 1e-6
    assert relative(velocity("union 2.1"), off) > 0.05


# alibaba-pai's files, of 2.1 also -tile, and -lite
PUBLISHED = {
    "union 1.0": (ControlConfig(6, 16, "none"), 136, (0, 5, 10, 15, 20, 25)),
    "union 2.0": (ControlConfig(15, 33, "control_layers"), 295, tuple(range(0, 30, 2))),
    "union 2.1": (ControlConfig(15, 33, "control_noise_refiner"), 295, tuple(range(0, 30, 2))),
    "union 2.1 lite": (ControlConfig(3, 33, "control_noise_refiner"), 91, (0, 10, 20)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tables_have_the_published_counts_and_places(name):
    of, count, places = PUBLISHED[name]
    names = rules.expected(rules.CONTROL, control.Branch(TURBO.transformer, of))
    if of.refiner == "control_layers":  # the file has a refiner that is not used
        own = ControlConfig(of.layers, of.in_channels, "control_noise_refiner")
        names |= rules.expected(rules.CONTROL, control.Branch(TURBO.transformer, own))
    assert len(names) == count
    assert of.places(30) == places


def test_arrays_of_a_control_block_begin_with_those_of_a_dit_block():
    """So that they use the same slots."""
    config = CONTROLLED.transformer
    own, plain = (list(named_arrays(of(config))) for of in (control.Block, dit.Block))
    assert own == [*plain, "to_trunk.bias", "to_trunk.kernel"]


@pytest.mark.parametrize("name", CONTROLS)
def test_runs_have_every_block_and_the_places(name):
    of, config = CONTROLS[name], CONTROLLED.transformer
    *early, main = control.runs(config, of)
    for i, place in enumerate(of.places(config.n_layers)):
        at = main.units.index(f"control_layers.{i}")
        assert main.units[at - 1] == f"layers.{place}"
    blocks = [path.rsplit(".", 2)[0] for path in named_arrays(control.ControlledDiT(config, of))]
    assert {u for run in control.runs(config, of) for u in run.units} == {
        ".".join(b.split(".")[:2])
        for b in blocks
        if b.split(".")[0] in ("layers", "noise_refiner", "control_layers", "control_noise_refiner")
    }
    assert [run.adds for run in early] == (
        [True, False] if of.refiner == "control_layers" else [True]
    )


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ({"layers": 3}, "3 control blocks for 4 main blocks"),
        ({"in_channels": 8}, "takes 8 channels"),
        ({"refiner": "own"}, "refiner must be one of"),
        ({"layers": 1, "refiner": "control_layers"}, "1 control blocks for 2 blocks"),
        ({"layers": 10**9}, "layers must be"),
        ({"more": 1}, "unknown key"),
    ],
)
def test_configs_that_no_controlnet_has_are_refused(of, message):
    whole = {"layers": 2, "in_channels": 33, "refiner": "none"} | of
    with pytest.raises(ConfigError, match=message):
        replace(CONTROLLED, control=ControlConfig.from_json(whole))
