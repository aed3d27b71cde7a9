"""The nodes' own logic and their folder, without a ComfyUI."""

import ast
import dataclasses
import json
import os
import signal
import sys
import textwrap
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests.small import CONTROLS
from zimage_jax import serve
from zimage_jax.comfyui import __main__ as command
from zimage_jax.comfyui.nodes import engine, home, settings
from zimage_jax.errors import UsageError
from zimage_jax.model.choices import LARGEST_LORA_WEIGHT, SAMPLERS, SCHEDULES, STRENGTH_RULES
from zimage_jax.model.config import TURBO
from zimage_jax.model.kv import KVPolicy
from zimage_jax.pipeline.canvas import Canvas
from zimage_jax.pipeline.job import Job
from zimage_jax.server.loras import LoraFolders
from zimage_jax.server.order import as_arguments

NODES = command.NODES
FILES = sorted(NODES.rglob("*.py"))


# -- the folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_they_import_what_comfyui_has_and_nothing_of_ours(path):
    theirs = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "server"}
    theirs |= {"PIL", "torch", "safetensors", "transformers"} | set(sys.stdlib_module_names)
    for each in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(each, ast.Import):
            assert {a.name.split(".")[0] for a in each.names} <= theirs
        elif isinstance(each, ast.ImportFrom):
            assert each.level <= 1
            assert each.level or each.module.split(".")[0] in theirs


def schemas() -> dict[str, set[str]]:
    """The inputs of each node, from the sources."""
    found = {}
    for path in FILES:
        tree = ast.parse(path.read_text("utf-8"))
        shared = {f.name: names(f) for f in tree.body if isinstance(f, ast.FunctionDef)}
        for of in ast.walk(tree):
            if isinstance(of, ast.Call) and ast.unparse(of.func) == "io.Schema":
                words = {word.arg: word.value for word in of.keywords}
                inputs = names(words["inputs"])
                for call in ast.walk(words["inputs"]):
                    if isinstance(call, ast.Call) and ast.unparse(call.func) in shared:
                        inputs |= shared[ast.unparse(call.func)]
                found[words["node_id"].value] = inputs
    return found


def names(tree: ast.AST) -> set[str]:
    return {
        call.args[0].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".Input")
    }


@pytest.mark.parametrize("node", sorted(schemas()))
def test_each_node_has_its_help_and_its_chinese(node):
    chinese = json.loads((NODES / "locales" / "zh" / "nodeDefs.json").read_text("utf-8"))[node]
    assert chinese["inputs"].keys() == schemas()[node]
    assert all(word["name"] for word in chinese["inputs"].values())
    for name in (f"{node}.md", f"{node}/zh.md"):
        assert (NODES / "web" / "docs" / name).read_text("utf-8").startswith("# Z-Image-Turbo ")


def test_the_registry_gets_the_projects_version():
    def project(path):
        return tomllib.loads(path.read_text("utf-8"))

    ours, root = project(NODES / "pyproject.toml"), project(NODES.parents[2] / "pyproject.toml")
    assert ours["project"]["version"] == root["project"]["version"]
    assert "comfyui" not in ours["project"]["name"].lower()
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= ours["tool"]["comfy"].keys()


# -- install ---------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    (tmp_path / "custom_nodes").mkdir()

    def call(*words):
        return CliRunner().invoke(command.command, [*words, str(tmp_path)])

    return call


def test_install_and_uninstall(tmp_path, run):
    target = tmp_path / "custom_nodes" / "zimage_jax"
    for _ in range(2):
        assert run("install").exit_code == 0
        assert (target / "__init__.py").is_file()
        (target / "old").touch()  # an install replaces the one before
    assert home.find(target) == home.Home(sys.executable, str(NODES.parents[2]))
    assert run("uninstall").exit_code == 0
    assert list((tmp_path / "custom_nodes").iterdir()) == []
    assert "there are no nodes of ours" in str(run("uninstall").exception)


def test_windows_portable_has_comfyui_in_its_folder(tmp_path):
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    assert CliRunner().invoke(command.command, ["install", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "ComfyUI" / "custom_nodes" / "zimage_jax" / command.MARK).is_file()


@pytest.mark.parametrize("word", ["install", "uninstall"])
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_install_did_not_write_stays(tmp_path, run, word, kind):
    target = tmp_path / "custom_nodes" / "zimage_jax"
    target.mkdir() if kind == "folder" else target.symlink_to(NODES)
    assert "not written by install" in str(run(word).exception)
    assert target.exists()


def test_a_folder_without_a_comfyui_is_refused(tmp_path):
    found = CliRunner().invoke(command.command, ["install", str(tmp_path)])
    assert "no ComfyUI is here" in str(found.exception)


def test_a_link_finds_the_python_beside_the_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv(home.VARIABLE, raising=False)
    here = tmp_path / "zimage_jax" / "comfyui" / "nodes"
    here.mkdir(parents=True)
    (tmp_path / "zimage_jax" / "serve.py").touch()
    with pytest.raises(RuntimeError, match="zimage_jax is not found"):
        home.find(here)
    program = tmp_path / ".venv" / home._PROGRAM
    program.parent.mkdir(parents=True)
    program.touch()
    assert home.find(here) == home.Home(str(program), str(tmp_path))
    monkeypatch.setenv(home.VARIABLE, "/usr/bin/python3")
    assert home.find(here) == home.Home("/usr/bin/python3", str(tmp_path))


# -- settings --------------------------------------------------------------------------------------

WIDGETS = {
    **{"chunk_count": 2, "max_chunk_memory": 3.5, "max_vram": 6.0, "host_memory": 0.0},
    **{"text_encoder_offload": False, "text_branch_always_loaded": True},
}
SCHEDULE = {
    **{"steps": 8, "shift": 3.0, "sampler": "euler", "sigmas": "simple", "kv_group": "1"},
    **{"kv_dtype": "default", "kv_switch_t": 400.0, "kv_reuse": 1, "dynamic_prefetch": True},
}


def test_the_choices_are_the_engines():
    assert tuple(SAMPLERS) == settings.SAMPLERS
    assert tuple(SCHEDULES) == settings.SIGMAS
    assert tuple(STRENGTH_RULES) == settings.STRENGTH_RULES


def test_the_loaders_widgets_are_memory_options():
    pipe = settings.pipe_of("MODEL", "", **WIDGETS).with_pin(1, "resident").with_pin(2, "streamed")
    pipe = pipe.with_pin(1, "streamed").with_pin(2, "auto")
    memory = as_arguments(
        {"memory": pipe.memory_of_job(pipe.cap, prefetch=0, vae_tile=None)}, LoraFolders([], TURBO)
    )
    found = memory["memory"]
    assert (found.chunks_on_device, found.max_chunk_bytes) == (2, int(3.5 * 2**30))
    assert (found.max_vram_bytes, found.text_encoder) == (6 << 30, "device")
    assert (found.prefetch, found.pins) == (0, ((1, "streamed"),))


def test_loras_add_up_and_a_pipe_has_one_controlnet():
    plain = settings.pipe_of("MODEL", "", **WIDGETS)
    pipe = plain.with_lora("ink.safetensors", 0.5).with_lora("styles\\ink.safetensors", -1.0)
    assert pipe.loras_of_job() == [
        {"name": "ink", "weight": 0.5},
        {"name": "styles/ink", "weight": -1.0},
    ]
    assert plain.loras_of_job() == []
    control = settings.Control("FILE", "", None, 0.75)
    assert pipe.with_control(control).loras == pipe.loras
    with pytest.raises(ValueError, match="has a ControlNet already"):
        pipe.with_control(control).with_control(control)


def test_weights_and_scales_have_the_engines_bounds():
    assert (settings.LARGEST_WEIGHT, settings.LARGEST_SCALE) == (LARGEST_LORA_WEIGHT, 10)
    job = {"prompt": "a", "control": Canvas.of_control(np.zeros((16, 16, 3), np.uint8))}
    config = dataclasses.replace(TURBO, control=CONTROLS["union 2.1"])
    assert Job.of(config, **job, control_scale=settings.LARGEST_SCALE).control_scale == 10
    with pytest.raises(UsageError, match="control_scale must be"):
        Job.of(config, **job, control_scale=settings.LARGEST_SCALE + 1)


def test_a_text_branch_is_not_both_offloaded_and_kept():
    with pytest.raises(ValueError, match="turn one of them off"):
        settings.pipe_of(None, "", **WIDGETS | {"text_encoder_offload": True})


@pytest.mark.parametrize("dtype", settings.KV_DTYPES)
@pytest.mark.parametrize("group", ["1", "4:2"])
def test_the_schedulers_widgets_are_a_kv_policy(dtype, group):
    found = settings.schedule_of(**SCHEDULE | {"kv_dtype": dtype, "kv_group": group, "kv_reuse": 2})
    policy = KVPolicy.parse(**found["kv"])
    assert policy.reuse == 2
    assert (policy.switch_t == 400.0) == (":" in dtype or ":" in group)


def test_a_scheduler_as_it_comes_changes_no_picture():
    found = settings.schedule_of(**SCHEDULE)
    assert "kv" not in found
    assert found["prefetch"] is None


def test_a_backslash_leaves_a_bracket_where_brackets_are_text():
    text = r"a \(red\) \[circle\]"
    assert settings.text_of(text, False) == r"a (red) \[circle\]"
    assert settings.text_of(text, True) == text


def test_sizes_prompts_and_seeds():
    assert settings.check_size(1024, 64) is None
    assert settings.check_size(1000, 64) == "width 1000: expected a multiple of 16, as 992"
    assert settings.prompts_of("a\n\n # no\n b (c:1.2)\n") == ["a", "b (c:1.2)"]
    assert settings.seeds_from(2**64 - 1, 2) == [2**64 - 1, 0]
    assert [settings.seed_to_json(n) for n in (7, 2**53 + 1)] == [7, str(2**53 + 1)]


# -- the engine's process --------------------------------------------------------------------------

# the engine's side of the protocol: "ok" is drawn, "hang" stays at its first step, "bad" is refused
FAKE = """
    import json, os, sys, time
    from http.server import BaseHTTPRequestHandler
    from socketserver import ThreadingTCPServer  # HTTPServer would ask for its host's name

    ThreadingTCPServer.request_queue_size = 64  # 16 connect at once

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *_): pass
        def frame(self, payload=b"", **facts):
            head = json.dumps(facts | {"bytes": len(payload)}).encode()
            data = len(head).to_bytes(4, "big") + head + payload
            self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data))
        def do_POST(self):
            word = self.rfile.read(int(self.headers["Content-Length"])).decode()
            key = "Bearer " + os.environ["ZIMAGE_API_KEY"]
            if word == "bad" or self.headers["Authorization"] != key:
                data = b'{"error": {"message": "a bad word"}}'
                self.send_response(400)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.frame(event="step", nfe=1, of=2)
            while word == "hang":
                time.sleep(0.01)
            if word == "late":
                self.frame(event="error", error="no memory")
            else:
                self.frame(word.encode(), event="done", reports=[{"word": word}])
            self.wfile.write(b"0\\r\\n\\r\\n")

    if "--model" in sys.argv:
        print("error: no such model", flush=True)
        sys.exit(1)
    server = ThreadingTCPServer(("127.0.0.1", 0), Handler)
    print(f"listening on http://127.0.0.1:{server.server_address[1]} (for tests)", flush=True)
    server.serve_forever()
"""


@pytest.fixture
def running(tmp_path):
    (tmp_path / "zimage_jax").mkdir()
    (tmp_path / "zimage_jax" / "__init__.py").touch()
    (tmp_path / "zimage_jax" / "serve.py").write_text(textwrap.dedent(FAKE))
    made = engine.Engine(lambda: home.Home(sys.executable, str(tmp_path)))
    yield made
    made.stop()


class Interrupt(BaseException):
    """As ComfyUI's."""


def ready(of: engine.Engine, cap: int | None = None, **files) -> list[str]:
    lines: list[str] = []
    of.ready(engine.Files(**files), cap, lines.append, lambda: None)
    return [line.partition(" (")[2].rstrip(")") for line in lines if "started" in line]


def draw(of: engine.Engine, *words: str, on_step=lambda *_: None, check=lambda: None):
    return of.draw([word.encode() for word in words], on_step, check, at_once=True)


def test_jobs_are_drawn_at_once_and_come_back_in_order(running):
    ready(running)
    seen = []
    words = [f"ok {n}" for n in range(20)]  # more than share a sweep
    found = draw(
        running, *words, on_step=lambda number, event, _: seen.append((number, event["nfe"]))
    )
    assert [(report["word"], data.decode()) for report, data in found] == list(
        zip(words, words, strict=True)
    )
    assert sorted(seen) == [(n, 1) for n in range(20)]


@pytest.mark.parametrize(("word", "message"), [("bad", "a bad word"), ("late", "no memory")])
def test_a_refusal_is_one_sentence(running, word, message):
    ready(running)
    with pytest.raises(engine.EngineError, match=f"^{message}$"):
        draw(running, "ok", word)


def test_it_is_started_again_after_it_was_killed(running):
    ready(running)

    def kill(*_):
        os.kill(running.pid, signal.SIGKILL)

    with pytest.raises(engine.EngineError, match=r"ended in the middle of a job.*\(SIGKILL\)"):
        draw(running, "hang", on_step=kill)
    ready(running)
    assert draw(running, "ok")
    assert running.starts == 2


def test_an_interrupt_leaves_at_once_and_the_engine_stays(running):
    ready(running)
    seen = []

    def check():
        if seen:
            raise Interrupt

    with pytest.raises(Interrupt):
        draw(running, "hang", on_step=lambda *_: seen.append(1), check=check)
    seen.clear()
    assert draw(running, "ok")
    assert running.starts == 1


def test_only_a_smaller_cap_another_model_or_an_unload_starts_it_again(running):
    assert len(ready(running, 2 << 30)) == 1
    assert ready(running, 3 << 30) == []
    assert ready(running, 1 << 30) == ["a smaller cap: 1.00 GiB"]
    running.stop("models were unloaded")
    assert running.pid is None
    assert ready(running, 1 << 30) == ["models were unloaded"]
    with pytest.raises(engine.EngineError, match=r"did not start \(exit code 1\): no such model"):
        ready(running, model="MODEL")


def test_another_controlnet_starts_it_again_and_none_does_not(running):
    loras = {"loras": ("A", "B")}
    first, second = ({"control": name, "control_stamp": "1", **loras} for name in "CD")
    assert len(ready(running, **loras)) == 1
    assert ready(running, **first) == ["a ControlNet"]
    assert ready(running, **loras) == []
    assert ready(running, **first) == []
    assert ready(running, **first | {"control_stamp": "2"}) == ["the ControlNet's file has changed"]
    assert ready(running, **second) == ["another ControlNet"]
    assert ready(running) == ["other folders of LoRAs"]
    assert running.starts == 5


def test_files_are_arguments_of_serve(tmp_path):
    folders = tmp_path / "A", tmp_path / "B"
    for folder in folders:
        folder.mkdir()
    files = engine.Files("MODEL", "", "CONTROL", "", tuple(map(str, folders)))
    found = serve.command.make_context("serve", files.arguments()).params
    assert (found["model"], found["control"]) == (Path("MODEL"), Path("CONTROL"))
    assert found["loras"] == folders
    assert engine.Files().arguments() == []


def test_nodes_in_two_threads_start_one(running):
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda _: ready(running), range(4)))
    assert running.starts == 1


def test_a_stream_that_ends_within_an_event_is_an_error():
    data = bytearray(b"\0\0\0\x16" + b'{"event":"a","bytes":9}'[:22])

    def read(count: int) -> bytes:
        found = bytes(data[:count])
        del data[:count]
        return found

    with pytest.raises((ConnectionError, ValueError)):
        list(engine.frames(read))
