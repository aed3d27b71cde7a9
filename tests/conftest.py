"""Strict mode: promotion strict, rank promotion raises, shapes checked, warnings are errors
(pyproject.toml)."""

import functools
import gc
import importlib.util
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# nearly all the time goes into compiling programs that run for milliseconds. With these ten of them take 1.3 s and not
# 5.9; each flag is known to jaxlib 0.10.2 and 0.11.2
FLAGS = {
    "--xla_backend_optimization_level": "0",
    "--xla_cpu_use_fusion_emitters": "false",
    "--xla_cpu_parallel_codegen_split_count": "1",
}
given = os.environ.get("XLA_FLAGS", "")
ours = (f"{flag}={value}" for flag, value in FLAGS.items() if flag not in given)
os.environ["XLA_FLAGS"] = " ".join([given, *ours])

import jax  # noqa: E402
import jaxtyping  # noqa: E402
from jax._src import lru_cache  # noqa: E402

import tests.strict  # noqa: E402, F401

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# every test loads its own model, and most of their programs are the same, in both processes of pytest-xdist too
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# or the folder's path were a part of every key
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def put(self, key: str, value: bytes) -> None:
    """In one step: JAX writes in place, and another process would read half of an entry."""
    part = self.path / f"{key}-{os.getpid()}"
    part.write_bytes(value)
    part.replace(self.path / f"{key}{lru_cache._CACHE_SUFFIX}")


lru_cache.LRUCache.put = put

# from here on every function checks its annotations in modules that name arrays; in all others they are mypy's to check,
# for beartype makes planning five times slower
ROOT = Path(__file__).parent.parent
PACKAGES = "zimage_jax", "checkpoints_convert"
CHECKED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if "from jaxtyping import" in path.read_text("utf-8")
]
jaxtyping.install_import_hook(CHECKED, "tests.strict.checked")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests import small  # noqa: E402
from tests.schedules import JOB, MODEL, SCAN, SCHEDULES  # noqa: E402
from zimage_jax import ZImage  # noqa: E402
from zimage_jax.pipeline import pipeline  # noqa: E402
from zimage_jax.runtime import deviceless  # noqa: E402
from zimage_jax.runtime.placement import Placement  # noqa: E402
from zimage_jax.runtime.programs import Programs  # noqa: E402
from zimage_jax.weights.formats import uniform  # noqa: E402
from zimage_jax.weights.writer import save  # noqa: E402

# the same examples every time, however slow and busy the machine
hypothesis.settings.register_profile(
    "steady",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("steady")

GOLDENS = Path(__file__).parent / "goldens"


def pytest_collection_finish():
    """What was imported and collected stays: the garbage collector need not look at it again."""
    gc.freeze()


@pytest.fixture(scope="session", params=["golden", pytest.param("live", marks=pytest.mark.live)])
def reference_outputs(request):
    """Name of a configuration -> what PyTorch gives for it: read from the goldens, or computed
    now."""
    if request.param == "golden":
        return lambda name: np.load(GOLDENS / f"{name}.npz")
    pytest.importorskip("torch", reason="the live comparison needs the reference extra")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests import reference

    def compute(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reference.outputs(name)

    return functools.cache(compute)


@pytest.fixture(scope="session")
def cache_of_processes(worker_id) -> str:
    """Where processes that tests start keep compiled programs: they write in place, and not beside another's tests."""
    return str(CACHE.with_name(f"xla-{worker_id}"))


@pytest.fixture(scope="session")
def gpu_compiler():
    """Needs no GPU, but the compiler's wheels."""
    if not any(map(importlib.util.find_spec, deviceless.PLUGINS)):
        pytest.skip("needs the GPU compiler's wheels")


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    """Name of a configuration -> its native checkpoint, in float32."""
    folder, made = tmp_path_factory.mktemp("native"), {}

    def make(name: str) -> Path:
        if name not in made:
            config = small.NATIVE[name]
            tensors = small.random_tensors(config)
            models = {c: small.our_model(c, config, tensors[c]) for c in small.MODELS}
            made[name] = save(
                folder / name,
                uniform(config, "float32"),
                models,
                small.tokenizer().to_str().encode(),
                {"made by": "tests"},
            )
        return made[name]

    return make


@pytest.fixture
def run(native, tmp_path, monkeypatch, capsys):
    """Run generate in an empty folder; gives exit code, standard output and standard error."""
    from zimage_jax import cli, generate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "use_compile_cache", lambda: None)

    def call(*words, model="plain", command=generate.command):
        prefix = ["--model", str(native(model))] if command is generate.command and model else []
        with pytest.raises(SystemExit) as leaving:
            cli.run(command, [*prefix, *map(str, words)], "generate")
        out = capsys.readouterr()
        return leaving.value.code, out.out, out.err

    return call


@pytest.fixture(scope="session", autouse=True)
def shared_programs():
    """What is compiled follows from storage, dtype and device: models that have these in common share it."""
    made: dict = {}

    def programs(storage, dtype, placement) -> Programs:
        key = storage, str(dtype), placement, placement.shares_memory
        if key not in made:
            made[key] = Programs(storage, dtype, placement)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Programs", programs)
        yield


@pytest.fixture
def own_programs(monkeypatch):
    """For a test of compilation: every model compiles for itself."""
    monkeypatch.setattr(pipeline, "Programs", Programs)


@pytest.fixture(scope="session")
def under(native):
    """(name of a schedule, dtype) -> the model under it, loaded once."""
    loaded = {}

    def get(name: str, dtype: str = "float32") -> ZImage:
        if (name, dtype) not in loaded:
            memory = (SCHEDULES | SCAN)[name]
            loaded[name, dtype] = ZImage.load(native(MODEL), dtype=dtype, memory=memory)
        return loaded[name, dtype]

    return get


@pytest.fixture(scope="session")
def drawn(under):
    """(name of a schedule, dtype) -> the second picture under it: what a plan keeps is loaded by the first job."""

    @functools.cache
    def draw(name: str, dtype: str = "float32"):
        under(name, dtype).generate("a red fox", **JOB)
        return under(name, dtype).generate("a red fox", **JOB)

    return draw


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The driver's ways with a device that has memory of its own: programs run ahead, what was pinned stays on the
    host."""
    monkeypatch.setattr(Placement, "shares_memory", property(lambda self: False))
