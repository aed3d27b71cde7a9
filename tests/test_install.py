"""Shell completion, and the package installed by pip alone: what it has when there is no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from checkpoints_convert import __main__ as converter
from checkpoints_convert import commands
from tests.schedules import every
from zimage_jax import __main__ as zimage
from zimage_jax import cli

ROOT = Path(__file__).parent.parent
PACKAGES = ("zimage_jax", "checkpoints_convert")
COMMANDS = {("zimage", name): command for name, command in zimage.command.commands.items()}
COMMANDS |= {("zimage-convert", name): command for name, command in commands.NAMED.items()}
COMMANDS |= {("zimage-convert", ""): commands.convert}


@pytest.fixture
def complete(monkeypatch, capsys):
    """What a shell is told to complete, as lines of type and value."""

    def call(script: str, *words: str) -> list[str]:
        name = f"_{script.replace('-', '_').upper()}_COMPLETE"
        given = [script, *words]
        for key, value in {
            name: "bash_complete",
            "COMP_WORDS": " ".join(given),
            "COMP_CWORD": str(len(given) - 1),
        }.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(sys, "argv", [f"/bin/{script}"])
        monkeypatch.setattr("zimage_jax.interrupts.install", lambda: None)
        with pytest.raises(SystemExit) as leaving:
            (zimage if script == "zimage" else converter).main()
        assert leaving.value.code == 0
        return capsys.readouterr().out.splitlines()

    return call


@pytest.mark.parametrize("script", ["zimage", "zimage-convert"])
def test_commands_are_completed(script, complete):
    names = {name for of, name in COMMANDS if of == script and name}
    assert {
        line.removeprefix("plain,") for line in complete(script, "") if "plain," in line
    } == names
    assert ("file," in complete(script, "")) == (script == "zimage-convert"), "convert's paths"


@pytest.mark.parametrize("of", COMMANDS, ids=" ".join)
def test_every_option_is_completed(of, complete):
    script, name = of
    options = {
        option
        for param in COMMANDS[of].params
        if param.param_type_name == "option"
        for option in (*param.opts, *param.secondary_opts)
        if option.startswith("--")
    }
    words = [name] if name else ["SRC"]
    assert options <= {line.split(",")[1] for line in complete(script, *words, "--")}


def test_values_and_files_are_completed(complete):
    assert complete("zimage", "generate", "--sampler", "dpm") == ["plain,dpmpp_2m"]
    assert complete("zimage", "generate", "--image", "x") == ["file,x"]
    assert complete("zimage-convert", "export", "x") == ["file,x"]
    assert complete("zimage-convert", "SRC", "--variant", "b") == ["plain,base"]


def test_a_command_has_the_name_that_it_was_called_by(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/zimage"])
    assert cli.program("zimage", "zimage_jax") == "zimage"
    monkeypatch.setattr(sys, "argv", ["/x/zimage_jax/__main__.py"])
    assert cli.program("zimage", "zimage_jax") == "python -m zimage_jax"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What a wheel is made of, apart: pip writes beside it."""
    folder = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def pip(*words) -> None:
    """This environment's pip, without a network."""
    call = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run([*map(str, call)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=every(["wheel", "pip install ."], [], ["wheel"]))
def installed(request, source, tmp_path_factory) -> Path:
    """The bin folder of a fresh environment, which has the dependencies of this one and our package
    alone from pip."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, symlinks=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    # last on the path, so that ours comes first; its own .pth files do not count
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    what = source
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    if request.param == "wheel":
        wheels = tmp_path_factory.mktemp("wheels")
        pip("wheel", *offline, "--wheel-dir", wheels, source)
        (what,) = wheels.iterdir()
    pip("--python", folder / "bin" / "python", "install", *offline, what)
    return folder / "bin"


def test_what_pip_installs_draws_with_its_own_model(installed, tmp_path):
    def run(*words) -> str:
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
        env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [*map(str, words)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import zimage_jax, checkpoints_convert as c; print(zimage_jax.__file__, c.__file__)"
    for path in run(installed / "python", "-c", where).split():
        assert Path(path).is_relative_to(installed.parent)
    picture = ("--size", "96x96", "--seed", 1, "-o", "x.png", "--quiet")
    run(installed / "zimage", "generate", "a red circle", *picture)
    assert "a red circle" in run(installed / "zimage", "info", "x.png")
    script = run(installed / "python", "-c", "import zimage_jax; print(zimage_jax.__version__)")
    assert script.strip() == "0.1.0"
    assert "Convert" in run(installed / "zimage-convert", "--help")
    model = Path(
        run(installed / "python", "-c", "import zimage_jax; print(zimage_jax.__file__)").strip()
    )
    tiny = model.parent / "assets" / "tiny"
    assert "native checkpoint" in run(installed / "zimage-convert", "inspect", tiny)
