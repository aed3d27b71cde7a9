"""ComfyUI's side: its folders, progress, interrupt and memory."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.text_encoders.llama
import folder_paths
from comfy.utils import ProgressBar
from PIL import Image
from server import PromptServer

from . import home, settings
from .engine import Engine, Files
from .settings import GIB

HERE = Path(__file__).parent
FOLDER = "zimage_jax"  # in ComfyUI's models folder, for native checkpoints
TINY = "tiny (in the package)"
NONE = "none"
ENGINE = Engine(lambda: home.find(HERE))

check = management.throw_exception_if_processing_interrupted


def set_up() -> None:
    """Add our models' folder, and let "Unload models" end the engine too."""
    folder_paths.add_model_folder_path(
        FOLDER, str(Path(folder_paths.models_dir) / FOLDER), is_default=True
    )
    unload = management.unload_all_models

    def unload_all_models() -> None:
        unload()
        ENGINE.stop("models were unloaded")

    management.unload_all_models = unload_all_models


# -- models ----------------------------------------------------------------------------------------


def models() -> list[str]:
    """The tiny model, native and diffusers folders, and ComfyUI's files of DiTs."""
    return [TINY, *_folders(), *folder_paths.get_filename_list("diffusion_models")]


def text_encoders() -> list[str]:
    return [NONE, *folder_paths.get_filename_list("text_encoders")]


def vaes() -> list[str]:
    return [NONE, *folder_paths.get_filename_list("vae")]


def loras() -> list[str]:
    """Those that the engine lists too."""
    names = folder_paths.get_filename_list("loras")
    return [name for name in names if name.endswith(settings.LORA_ENDING)]


def _lora_folders() -> tuple[str, ...]:
    return tuple(f for f in folder_paths.get_folder_paths("loras") if Path(f).is_dir())


def lora_path(name: str) -> str:
    return folder_paths.get_full_path_or_raise("loras", name)


def control_nets() -> list[str]:
    return folder_paths.get_filename_list("model_patches")


def control_path(name: str) -> str:
    return folder_paths.get_full_path_or_raise("model_patches", name)


def _folders() -> dict[str, Path]:
    return {
        f"{kind}/{path.name}": path
        for kind, mark in ((FOLDER, "manifest"), ("diffusers", "model_index.json"))
        for folder in folder_paths.get_folder_paths(kind)
        for path in (sorted(Path(folder).iterdir()) if Path(folder).is_dir() else ())
        if (path / mark).exists()
    }


def model_path(model: str, text_encoder: str, vae: str) -> str | None:
    """What --model takes. Raises ValueError, in one sentence."""
    folders = _folders()
    is_file = model != TINY and model not in folders
    for name, value in (("text_encoder", text_encoder), ("vae", vae)):
        if is_file and value == NONE:
            raise ValueError(f"{name}: {model} has the DiT alone; choose the file of its {name}")
        if not is_file and value != NONE:
            raise ValueError(f"{name}: {model} has its own; choose none")
    if model == TINY:
        return None
    if not is_file:
        return str(folders[model])
    paths = [
        folder_paths.get_full_path_or_raise(kind, name)
        for kind, name in (
            ("diffusion_models", model),
            ("text_encoders", text_encoder),
            ("vae", vae),
        )
    ]
    return ",".join([*paths, _tokenizer()])


def stamp_of(path: str | None) -> str:
    """Changes with files: those named, or the manifest of a model's folder."""
    found = []
    for file in map(Path, path.split(",") if path else ()):
        for part in [file, file / "manifest" / "manifest.json", file / "model_index.json"]:
            if part.is_file():
                facts = part.stat()
                found.append(f"{facts.st_mtime_ns}-{facts.st_size}")
    return " ".join(found)


def _tokenizer() -> str:
    """tokenizer.json of the Qwen that ComfyUI has in three other files."""
    from transformers import AutoTokenizer

    source = Path(comfy.text_encoders.llama.__file__).parent / "qwen25_tokenizer"
    target = Path(folder_paths.get_temp_directory()) / "zimage_jax" / "tokenizer.json"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        AutoTokenizer.from_pretrained(source).backend_tokenizer.save(str(target))
    return str(target)


# -- memory ----------------------------------------------------------------------------------------


def cap_of(wanted: int | None) -> int | None:
    """Device bytes that the engine may take: those wanted, or what is free when it starts. None
    where torch has no GPU: JAX then takes what its own device has."""
    if wanted is not None or management.get_torch_device().type == "cpu":
        return wanted
    return ENGINE.cap if ENGINE.pid else management.get_free_memory()


def memory_line(wanted: int | None) -> str:
    """What the engine may take, and torch's own share beside it."""
    device = management.get_torch_device()
    if device.type == "cpu":
        share = "torch computes on the CPU"
    else:
        total, free = management.get_total_memory(device), management.get_free_memory(device)
        share = f"torch and others hold {(total - free) / GIB:.2f} of {total / GIB:.2f} GiB"
    cap = cap_of(wanted)
    most = "what is free" if cap is None else f"{cap / GIB:.2f} GiB"
    return f"engine: at most {most} of device memory; {share}"


# -- what a node shows -----------------------------------------------------------------------------


class Shown:
    """A node that computes: its line of text, its bar and its previews."""

    def __init__(self, node_id: str, jobs: int = 0):
        self._node, self._lines, self._jobs = node_id, list[str](), jobs
        self._bar = ProgressBar(max(1, jobs), node_id=node_id)
        self._steps: dict[int, int] = {}

    def tell(self, line: str) -> None:
        """Show a line beneath those before; one about the same thing takes its place."""
        topic = line.partition(":")[0]
        self._lines = [old for old in self._lines if old.partition(":")[0] != topic] + [line]
        server = PromptServer.instance
        server.send_progress_text("\n".join(self._lines), self._node, server.client_id)

    def hear(self, number: int, event: dict[str, Any], data: bytes) -> None:
        """An event of one of the jobs."""
        if event["event"] == "plan":
            self.tell(settings.line_of_plan(event))
        elif event["event"] == "warning":
            self.tell(f"warning: {event['warning']}")
        elif event["event"] == "step":
            self._steps[number] = event["nfe"]
            preview = ("JPEG", Image.open(io.BytesIO(data)), None)
            total = self._jobs * event["of"]
            self._bar.update_absolute(sum(self._steps.values()), total, preview)


def ready(pipe: settings.Pipe, tell: Callable[[str], None]) -> int | None:
    """Have an engine for the pipe. Returns the device bytes that its jobs may take."""
    cap = cap_of(pipe.cap)
    files = Files(pipe.model, pipe.stamp, loras=_lora_folders())
    if pipe.control is not None:
        files = replace(files, control=pipe.control.file, control_stamp=pipe.control.stamp)
    ENGINE.ready(files, cap, tell, check)
    return cap
