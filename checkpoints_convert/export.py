"""A native checkpoint back to PyTorch's files, in bfloat16: the way out.

Layouts: "diffusers", the published folder, and "comfyui", the three files of ComfyUI's `models`
folder. Names and shapes are those of the converter's tables, read from right to left. Units are read
one at a time, and written tensor by tensor.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from tqdm import tqdm

from zimage_jax import interrupts
from zimage_jax.errors import OutputError
from zimage_jax.files import LARGEST_JSON, kind_of, read_regular
from zimage_jax.model.config import TURBO_SHIFT, ModelConfig
from zimage_jax.units import size
from zimage_jax.weights import components, sources
from zimage_jax.weights import names as rules
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.formats import uniform
from zimage_jax.weights.sources import COMPONENTS
from zimage_jax.weights.writer import Lock, partial_folder

from .convert import Stored, refuse_widening

LAYOUTS = ("diffusers", "comfyui")
LARGEST_SHARD = 5_000_000_000  # bytes of parameters in one file of the diffusers layout
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ROWS = 256  # of a PyTorch matrix, written at a time: the transpose of so many fits the cache
_MARK = "export.json"  # in a folder that is not complete: it is ours
# as Qwen3ForCausalLM is saved: transformers and ComfyUI both read it so
_PREFIX = {"transformer": "", "text_encoder": "model.", "vae": ""}
# Qwen's, for the messages that diffusers' ZImagePipeline makes
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_COMFY_LAYOUT = {"transformer": "comfy", "text_encoder": "diffusers", "vae": "flux"}


@dataclass(frozen=True)
class _Part:
    """A PyTorch tensor to write. `constant`: its value, if it stands for a tensor of the original
    that Z-Image does not use and checkpoints of ours do not have."""

    name: str
    entry: rules.Entry
    constant: float | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.entry.shape) * _BFLOAT16.itemsize


@dataclass(frozen=True)
class _File:
    """A safetensors file to write: `units` are (unit, its tensors)."""

    component: str
    name: str
    units: tuple[tuple[str, tuple[_Part, ...]], ...]

    @property
    def parts(self) -> Iterator[_Part]:
        return (part for _, parts in self.units for part in parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def export(
    source: Checkpoint,
    dst: Path,
    layout: str,
    *,
    largest_shard: int = LARGEST_SHARD,
    quiet: bool = False,
) -> Path:
    """Write the folder `dst` from a native checkpoint, in bfloat16. Returns `dst`.

    `layout`: one of LAYOUTS. The folder appears whole or not at all. Raises DamagedError;
    ConversionError if a parameter is stored in int8; OutputError if `dst` exists, or the disk is
    full or cannot be written.
    """
    refuse_widening(source, uniform(source.config, "bfloat16"))
    if layout == "diffusers":
        files = [f for c in COMPONENTS for f in _shards(source.config, c, largest_shard)]
        texts = _diffusers_texts(source, files)
    else:
        files, texts = [_comfy_file(source.config, c) for c in COMPONENTS], {}
    with _folder(dst, sum(file.nbytes for file in files)) as folder:
        with tqdm(
            total=sum(file.nbytes for file in files),
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc="export",
            disable=quiet,
        ) as bar:
            for file in files:
                _write(source, folder / file.name, file, bar)
        for name, data in texts.items():
            _put(folder / name, data)
    return dst


# -- what is written -------------------------------------------------------------------------------


def _parts(config: ModelConfig, component: str, layout: str) -> dict[str, list[_Part]]:
    """Unit -> its tensors, in the model's order of units."""
    table = sources.table(config, component, layout)
    entries = rules.expected(table, components.spec(config, component))
    prefix, found = _PREFIX[component], dict[str, list[_Part]]()
    for unit in components.units(config, component):
        found[unit] = []
    for name, entry in entries.items():
        found[components.unit_of(entry.paths[0])].append(_Part(prefix + name, entry))
    if component == "text_encoder":
        found[""] = list(_unused(config, entries.keys()))
    return found


def _unused(config: ModelConfig, used: Any) -> Iterator[_Part]:
    """The text encoder's last layer and norm, whose output is never used, but which programs expect:
    matrices of zeros, with which the layer changes nothing, and scales of one."""
    n = config.text_encoder.num_hidden_layers
    longer = replace(config, text_encoder=replace(config.text_encoder, num_hidden_layers=n + 1))
    table = sources.table(config, "text_encoder", "diffusers")
    for name, entry in rules.expected(table, components.spec(longer, "text_encoder")).items():
        if name not in used:
            constant = 1.0 if len(entry.shape) == 1 else 0.0
            yield _Part(_PREFIX["text_encoder"] + name, entry, constant)
    shape = (config.text_encoder.hidden_size,)
    yield _Part(_PREFIX["text_encoder"] + "norm.weight", rules.Entry((), rules.SAME, shape), 1.0)


def _shards(config: ModelConfig, component: str, largest: int) -> list[_File]:
    """A component's files in the diffusers layout: one, or shards of at most `largest` bytes."""
    groups: list[list[tuple[str, tuple[_Part, ...]]]] = [[]]
    room = largest
    for unit, parts in _parts(config, component, "diffusers").items():
        nbytes = sum(part.nbytes for part in parts)
        if nbytes > room and groups[-1]:
            groups.append([])
            room = largest
        groups[-1].append((unit, tuple(parts)))
        room -= nbytes
    stem = f"{component}/{sources.WEIGHTS[component]}"
    if len(groups) == 1:
        return [_File(component, f"{stem}.safetensors", tuple(groups[0]))]
    return [
        _File(component, f"{stem}-{k:05d}-of-{len(groups):05d}.safetensors", tuple(units))
        for k, units in enumerate(groups, 1)
    ]


def _comfy_file(config: ModelConfig, component: str) -> _File:
    model = "z_image_turbo" if config.scheduler.shift == TURBO_SHIFT else "z_image"
    name = {
        "transformer": f"diffusion_models/{model}_bf16.safetensors",
        "text_encoder": "text_encoders/qwen_3_4b.safetensors",
        "vae": "vae/ae.safetensors",
    }[component]
    units = _parts(config, component, _COMFY_LAYOUT[component])
    return _File(component, name, tuple((unit, tuple(parts)) for unit, parts in units.items()))


def _diffusers_texts(source: Checkpoint, files: list[_File]) -> dict[str, bytes]:
    """Name -> bytes of configs, indexes and tokenizer."""
    texts: dict[str, Any] = dict(_configs(source.config))
    for component in COMPONENTS:
        own = [file for file in files if file.component == component]
        if len(own) > 1:
            names = {part.name: Path(file.name).name for file in own for part in file.parts}
            total = sum(file.nbytes for file in own)
            place = f"{component}/{sources.WEIGHTS[component]}.safetensors.index.json"
            texts[place] = {"metadata": {"total_size": total}, "weight_map": names}
    found = {name: (json.dumps(text, indent=2) + "\n").encode() for name, text in texts.items()}
    found["tokenizer/tokenizer.json"] = read_regular(source.tokenizer(), LARGEST_JSON)
    return found


def _configs(config: ModelConfig) -> dict[str, dict]:
    """Place -> JSON object, of model_index.json and the configs it names.

    What every Z-Image has in common is not in our configs: `from_json` there accepts these values
    and no others.
    """
    levels = len(config.vae.block_out_channels)
    common: dict[str, dict[str, Any]] = {
        "transformer": {
            "_class_name": "ZImageTransformer2DModel",
            "all_patch_size": [2],
            "all_f_patch_size": [1],
        },
        "text_encoder": {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "hidden_act": "silu",
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "force_upcast": True,
            "mid_block_add_attention": True,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        },
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": False,
        },
    }
    own = config.to_json()
    made = {place: common[name] | own[name] for name, (_, place) in sources.CONFIGS.items()}
    made["model_index.json"] = {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    made["tokenizer/tokenizer_config.json"] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": _CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
    }
    return made


# -- writing ---------------------------------------------------------------------------------------


def _write(source: Checkpoint, path: Path, file: _File, bar: Any) -> None:
    """Write one safetensors file, unit by unit."""
    path.parent.mkdir(exist_ok=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in file.parts:
        offsets = [end, end + part.nbytes]
        header[part.name] = {
            "dtype": "BF16",
            "shape": list(part.entry.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the safetensors library aligns the data
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for unit, parts in file.units:
            stored = Stored(source, file.component, unit) if unit else None
            for part in parts:
                for rows in _rows(stored, part):
                    f.write(rows.view(np.uint8).data)
                    bar.update(rows.nbytes)
                    interrupts.check()
        assert f.tell() == 8 + len(text) + end, path
        _flush(f)


def _rows(stored: Stored | None, part: _Part) -> Iterator[np.ndarray]:
    """The PyTorch tensor in contiguous runs of rows."""
    if stored is None:
        yield np.full(part.entry.shape, part.constant, _BFLOAT16)
        return
    for path in part.entry.paths:  # of a fused tensor, one after another along the first axis
        (native,) = stored.runs(path, _BFLOAT16)
        tensor = rules.to_source(native, part.entry.transform)
        for first in range(0, len(tensor), _ROWS):
            yield np.ascontiguousarray(tensor[first : first + _ROWS])


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as f:
        f.write(data)
        _flush(f)


def _flush(f: BinaryIO) -> None:
    f.flush()
    os.fsync(f.fileno())


@contextmanager
def _folder(dst: Path, nbytes: int) -> Iterator[Path]:
    """DST.partial, with room for `nbytes`: renamed to DST at the end, removed after a fault.

    Raises OutputError.
    """
    partial = partial_folder(dst)
    try:
        _refuse_existing(dst)
        dst.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(dst)
        try:
            _refuse_existing(dst)  # another process may have finished just now
            _refuse_strange(partial)
            try:
                if partial.exists():  # a killed process left it
                    shutil.rmtree(partial)
                partial.mkdir()
                _put(partial / _MARK, b"{}\n")
                free = shutil.disk_usage(partial).free
                if nbytes > free:
                    raise OutputError(f"{dst}: needs {size(nbytes)} of disk, {size(free)} are free")
                yield partial
                os.replace(partial, dst)
                (dst / _MARK).unlink()
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        finally:
            lock.release()
    except OSError as fault:
        raise OutputError(
            f"{dst}: cannot be written ({fault.strerror or fault}); choose another place"
        ) from None


def _refuse_existing(dst: Path) -> None:
    if os.path.lexists(dst):
        raise OutputError(f"{dst}: already exists; remove it or choose another name")


def _refuse_strange(partial: Path) -> None:
    """Raises OutputError if there is a folder, or something else, that no export left."""
    if not os.path.lexists(partial):
        return
    is_folder = kind_of(partial, OutputError) == "folder" and not partial.is_symlink()
    # an empty one is left by a process that was killed before it wrote the mark
    if not is_folder or (os.listdir(partial) and not (partial / _MARK).is_file()):
        raise OutputError(
            f"{partial}: exists and is not an unfinished export; move it away or choose another "
            "name"
        )
