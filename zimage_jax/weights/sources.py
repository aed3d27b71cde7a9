"""Models in files of other programs: a folder in diffusers layout, or single files as ComfyUI has
them.

Every source is a set of safetensors and GGUF files, whose weights may be quantised. Pickles are
never opened: they can run code.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, ConversionError, ForeignError, UsageError
from ..files import LARGEST_JSON, kind_of, open_regular, printable, read_json, read_regular
from ..model.config import (
    PRESETS,
    ControlConfig,
    DefaultsConfig,
    DiTConfig,
    ModelConfig,
    SigmasConfig,
    TextEncoderConfig,
    VAEConfig,
)
from ..model.control import Branch
from ..model.prompt import Prompts
from . import components, quantised
from . import names as rules
from .checkpoint import CONTROL, MODEL, Checkpoint
from .gguf_file import MAGIC, read_gguf
from .tensors import READABLE, Header, Tensor, read_safetensors

COMPONENTS = ("transformer", "text_encoder", "vae")
CONFIGS: dict[str, tuple[Any, str]] = {
    "transformer": (DiTConfig, "transformer/config.json"),
    "text_encoder": (TextEncoderConfig, "text_encoder/config.json"),
    "vae": (VAEConfig, "vae/config.json"),
    "scheduler": (SigmasConfig, "scheduler/scheduler_config.json"),
}
_FLAGS = {"transformer": "--dit", "text_encoder": "--text-encoder", "vae": "--vae"}
WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}
# prefixes of tensor names in files that may have all three models
_PREFIXES = {
    "transformer": re.compile(r"^((model\.)?diffusion_model\.)?"),
    "text_encoder": re.compile(r"^(text_encoders\.qwen3_4b\.transformer\.)?(model\.)?"),
    "vae": re.compile(r"^((first_stage_model|vae)\.)?"),
}
_OF_OTHER_MODELS = {
    "transformer": ("text_encoders.", "first_stage_model.", "vae."),
    "text_encoder": ("model.diffusion_model.", "first_stage_model.", "vae."),
    "vae": ("model.diffusion_model.", "text_encoders."),
}
_LARGEST_INDEX = 64 << 20
# a header's names of its model: GGUF's, and those of safetensors' metadata
NAMES = ("general.name", "modelspec.title")
# the pipeline's text encoder, with the quantisation that some append
_QWEN3_4B = re.compile(r"qwen[ _-]?3[ _-]4b([ _.-]([iqf]\w*|bf16))?", re.IGNORECASE)
_ROPE_THETA = "qwen3.rope.freq_base"  # GGUF's
_SHOWN = 3  # tensors listed per kind of fault
# tensors that a source may have and the model never uses
_LEFT_OUT = {
    "transformer": re.compile(r"norm_final\.weight"),
    "text_encoder": re.compile(r"norm\.weight|lm_head\.weight"),
    "vae": re.compile(r"(?!)"),
}
# Union 2.0's own refiner was not trained: its authors' code runs the control layers instead
_LEFT_OUT_OF_CONTROL = re.compile(r"control_noise_refiner\..*")
_CONTROL = re.compile(r"control_(layers|noise_refiner|all_x_embedder)\..*")
# other models, recognised by a tensor name that only they have
_OTHERS = {
    r".*[._]lora_(A|B|up|down|a|b)\..*": "a LoRA, which is not a whole model",
    _CONTROL.pattern: "a Z-Image ControlNet, which is converted alone: SRC DST",
    r"siglip_.*": "Z-Image Omni or Edit, which are not supported",
    r"dec_net\..*": "Z-Image in pixel space, which is not supported",
    r"double_blocks\.\d+\.img_attn\.qkv\.weight": "Flux",
    r"transformer_blocks\.\d+\.attn\.add_k_proj\.weight": "Flux or SD3 (diffusers)",
    r"joint_blocks\.\d+\..*": "SD3",
    r"(input_blocks|down_blocks)\.\d+\..*(transformer_blocks|attentions)\..*": "SDXL or another Stable Diffusion UNet",
    r"conditioner\.embedders\..*": "SDXL",
    r"layers\.\d+\.attention\.wqkv\.weight": "Lumina",
    r"text_model\.encoder\..*": "a CLIP text encoder",
    r"encoder\.block\.\d+\.layer\..*": "a T5 text encoder",
    r"visual\..*": "a Qwen vision-language model",
}


@dataclass
class Component:
    """One component of a source: its layout, and its tensors by name without prefix."""

    name: str
    layout: str  # "diffusers", "comfy" or "flux"; "control" of a ControlNet
    tensors: dict[str, Tensor] = field(default_factory=dict)
    duplicates: list[Tensor] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """The files of its tensors, sorted."""
        return sorted({t.file for t in self.tensors.values()})


def table(config: ModelConfig, component: str, layout: str) -> list:
    """The rules (weights.names) for a component in this layout."""
    if layout == "control":
        return rules.CONTROL
    if layout == "flux":
        return rules.vae_flux(len(config.vae.block_out_channels))
    return {
        ("transformer", "diffusers"): rules.DIT_DIFFUSERS,
        ("transformer", "comfy"): rules.DIT_COMFY,
        ("text_encoder", "diffusers"): rules.TEXT_ENCODER,
        ("vae", "diffusers"): rules.VAE_DIFFUSERS,
    }[component, layout]


@functools.cache  # takes 0.3 s for some hundred tensors, and is called twice per component
def _entries(config: ModelConfig, component: str, layout: str) -> dict[str, rules.Entry]:
    spec = components.spec(config, component)
    if layout == "control":
        assert config.control is not None
        spec = Branch(config.transformer, config.control)
    return rules.expected(table(config, component, layout), spec)


def fits(config: ModelConfig, component: Component) -> bool:
    """Whether a component has every tensor of the model in its shape."""
    entries = _entries(config, component.name, component.layout)
    shapes = {name: tensor.shape for name, tensor in component.tensors.items()}
    return all(shapes.get(name) == entry.shape for name, entry in entries.items())


@dataclass
class Source:
    """All that a conversion reads: components by name, config and tokenizer."""

    components: dict[str, Component]
    config: ModelConfig
    tokenizer: Path | None  # None for a ControlNet

    def entries(self, component: str) -> dict[str, rules.Entry]:
        """Name -> entry of every tensor that the component must have."""
        return _entries(self.config, component, self.components[component].layout)

    def check(self) -> None:
        """Raises ConversionError, which lists the faults of all components: unknown, missing,
        duplicate and misshapen tensors, and unsupported dtypes."""
        groups: dict[tuple[str, str], list[str]] = {}
        for component in self.components:
            for kind, what in self._faults(component):
                groups.setdefault((component, kind), []).append(what)
        if not groups:
            return
        lines = []
        for (component, kind), faults in groups.items():
            more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            lines.append(f"  {component}: {kind} {', '.join(faults[:_SHOWN])}{more}")
        kinds = list(dict.fromkeys(kind for _, kind in groups))
        counts = [sum(len(f) for (_, k), f in groups.items() if k == kind) for kind in kinds]
        raise ConversionError(
            f"the tensors are not exactly those of the configured Z-Image{self._whose} "
            f"({', '.join(f'{n} {kind}' for n, kind in zip(counts, kinds, strict=True))}):\n"
            + "\n".join(lines)
        )

    @property
    def kind(self) -> str:
        """The kind of checkpoint that it becomes (checkpoint.MODEL or CONTROL)."""
        return MODEL if self.config.control is None else CONTROL

    @property
    def _whose(self) -> str:
        return "" if self.kind == MODEL else "'s ControlNet"

    def identity(self) -> dict[Path, list]:
        """File -> [name, bytes, time of its last change], JSON: what tells it from another."""
        files = {f: f.stat() for of in self.components.values() for f in of.files}
        return {f: [f.name, s.st_size, s.st_mtime_ns] for f, s in files.items()}

    def read_tokenizer(self) -> bytes | None:
        """The bytes of the tokenizer. Raises ConversionError if it is another model's."""
        if self.tokenizer is None:
            return None
        data = read_regular(self.tokenizer, LARGEST_JSON, ConversionError)
        vocabulary = Prompts.parse(data, str(self.tokenizer)).vocab_size
        if vocabulary > self.config.text_encoder.vocab_size:
            raise ConversionError(
                f"{self.tokenizer}: has {vocabulary} tokens, the text encoder "
                f"{self.config.text_encoder.vocab_size}; it belongs to another model"
            )
        return data

    def remarks(self) -> list[str]:
        """What a user should know: a text encoder that is not the pipeline's.

        Its tensors have the same names and shapes, so only what its file says of itself tells: a
        name in the header, or the base of its rotary positions.
        """
        if "text_encoder" not in self.components:
            return []
        encoder = self.components["text_encoder"]
        names = [encoder.metadata[key] for key in NAMES if encoder.metadata.get(key)]
        own, theta = self.config.text_encoder, PRESETS["turbo"].text_encoder.rope_theta
        is_published = replace(own, rope_theta=theta) == PRESETS["turbo"].text_encoder
        is_other = is_published and own.rope_theta != theta
        if names and (is_other or not _QWEN3_4B.fullmatch(names[0])):
            what = f"calls itself '{printable(names[0], 80)}'"
        elif is_other:
            what = f"has rope_theta {own.rope_theta:g}, as Qwen3-4B-Instruct-2507 has,"
        else:
            return []
        return [
            f"the text encoder in {encoder.files[0].name} {what} and is not the Qwen3-4B that "
            "Z-Image was trained with: its pictures differ"
        ]

    def _left_out(self, component: str) -> re.Pattern:
        """The tensors that are not used."""
        control = self.config.control
        if control is not None and control.refiner == "control_layers":
            return _LEFT_OUT_OF_CONTROL
        return _LEFT_OUT[component]

    def _faults(self, component: str) -> Iterator[tuple[str, str]]:
        """(kind, tensor) of each fault."""
        found, expected = self.components[component].tensors, self.entries(component)
        last = f"layers.{self.config.text_encoder.n_layers}."  # the layer that never runs
        for tensor in self.components[component].duplicates:
            yield "duplicate", f"{printable(tensor.name)} (in {tensor.file.name} and elsewhere)"
        for name in sorted(expected.keys() - found.keys()):
            yield "missing", f"{name} {list(expected[name].shape)}"
        for name, tensor in sorted(found.items()):
            if name in expected:
                if tensor.shape != expected[name].shape:
                    wanted, got = list(expected[name].shape), printable(list(tensor.shape))
                    yield "misshapen", f"{name}: expected {wanted}, got {got}"
                if not tensor.is_readable:
                    yield f"{tensor.dtype}, not {', '.join(READABLE)}:", name
                continue
            is_last_layer = component == "text_encoder" and name.startswith(last)
            if not is_last_layer and not self._left_out(component).fullmatch(name):
                yield "unknown", f"{printable(name)} {printable(list(tensor.shape))}"


# -- opening ---------------------------------------------------------------------------------------


def open_source(
    path: Path | None,
    files: dict[str, Path],
    config_folder: Path | None,
    tokenizer: Path | None,
    variant: str | None = None,
) -> Source:
    """The source in `path` and `files`; only headers, configs and indexes are read.

    `path`: a folder in diffusers layout, or one file with all models. `files`: component -> file,
    instead of those in `path`. `variant`: a name in PRESETS, for files without configs. Raises
    UsageError for missing or contradictory arguments, ForeignError for another model's files,
    ConversionError for damaged files, ConfigError for an unsupported config.
    """
    parts = {c: open_file(c, file) for c, file in files.items()}
    missing = [c for c in COMPONENTS if c not in files]
    kind = path and kind_of(path)
    if path is not None and kind == "folder":
        parts |= {c: open_component_folder(c, path / c) for c in missing}
    elif path is not None and kind:
        parts |= {c: open_file(c, path) for c in missing}
    elif path is not None:
        raise ForeignError(f"{path}: no such file or folder")
    elif missing:
        flags = ", ".join(_FLAGS[c] for c in missing)
        raise UsageError(f"without SRC every component needs a file: {flags} missing")
    configs = config_folder or (path if kind == "folder" else None)
    if configs is not None:
        if variant:
            raise UsageError(
                f"--variant is for single files without configs: {configs} has configs"
            )
        config = read_configs(configs)
        tokenizer = tokenizer or configs / "tokenizer" / "tokenizer.json"
    elif tokenizer is None:
        raise UsageError(
            "single files have no tokenizer: give --config FOLDER, or --tokenizer FILE for the "
            "published model"
        )
    else:
        config = PRESETS[variant or "turbo"]
    if not kind_of(tokenizer):
        raise ConversionError(
            f"{tokenizer}: the tokenizer is missing; Z-Image's folder has it as "
            "tokenizer/tokenizer.json"
        )
    theta = _rope_theta(parts["text_encoder"])
    if theta is not None:
        config = replace(config, text_encoder=replace(config.text_encoder, rope_theta=theta))
    return Source({c: parts[c] for c in COMPONENTS}, config, tokenizer)


def _rope_theta(encoder: Component) -> float | None:
    """The base of the rotary positions that a text encoder's file names. Raises ConversionError."""
    text = encoder.metadata.get(_ROPE_THETA)
    if text is None:
        return None
    try:
        theta = float(text)
    except ValueError:
        theta = math.nan
    if not 1 < theta < 1e12:
        raise ConversionError(
            f"{encoder.files[0]}: {_ROPE_THETA} is {printable(text, 40)}, expected a number above 1"
        )
    return theta


def is_control(path: Path) -> bool:
    """Whether a file is a ControlNet's. Raises as `read_header`."""
    return any(_CONTROL.fullmatch(tensor.name) for tensor in read_header(path).tensors)


def controlled_config(model: Path | None, variant: str | None) -> ModelConfig:
    """The config of the model that a ControlNet is for: of a native checkpoint or a folder in
    diffusers layout, or a preset's. Raises ConfigError, and as Checkpoint."""
    if model is None:
        return PRESETS[variant or "turbo"]
    if kind_of(model / "manifest", ForeignError):
        return Checkpoint(model).config
    return read_configs(model)


def open_control_file(file: Path, config: ModelConfig) -> Source:
    """A ControlNet's file, as its authors and diffusers have it.

    `config`: of the model that it controls. Raises ConversionError for a file that is no such
    ControlNet, ConfigError.
    """
    header = read_header(file)
    tensors = quantised.merged(
        {t.name: t for t in header.tensors}, quantised.layers_of(header.metadata, file)
    )
    layers = {m[1] for name in tensors if (m := re.fullmatch(r"control_layers\.(\d+)\..*", name))}
    embedder = tensors.get("control_all_x_embedder.2-1.weight")
    if embedder is None or len(embedder.shape) != 2 or embedder.shape[1] % 4 or not layers:
        raise ConversionError(
            f"{file}: expected a ControlNet Union of Z-Image, with control_layers and a matrix "
            "control_all_x_embedder.2-1.weight of 4 inputs per channel"
        )
    parts = {
        "layers": len(layers),
        "in_channels": embedder.shape[1] // 4,
        "refiner": _refiner(tensors),
    }
    try:
        config = replace(config, control=ControlConfig.from_json(parts))
    except ConfigError as fault:
        raise ConfigError(f"{file}: {fault}") from None
    found = Component("transformer", "control", tensors)
    return Source({"transformer": found}, config, None)


def _refiner(tensors: dict[str, Tensor]) -> str:
    """Which of config.REFINERS a ControlNet has. Union 2.0 has 2.1's tensors, but its refiner's
    maps were never trained: they are 0 (as diffusers and ComfyUI tell them apart)."""
    if not any(name.startswith("control_noise_refiner.") for name in tensors):
        return "control_layers"  # diffusers leaves them out
    first = "control_noise_refiner.0."
    maps = [tensors.get(f"{first}{name}_proj.weight") for name in ("before", "after")]
    if maps == [None, None]:
        return "none"
    for tensor in maps:
        is_matrix = tensor is not None and len(tensor.shape) == 2 and tensor.is_readable
        if tensor is None or (
            is_matrix and not tensor.rows(0, tensor.shape[0], np.dtype(np.float32)).any()
        ):
            return "control_layers"
    return "control_noise_refiner"


def read_configs(folder: Path) -> ModelConfig:
    """The configs of a folder in diffusers layout. Raises ConfigError."""
    parts = {}
    for name, (kind, path) in CONFIGS.items():
        data = read_json(folder / path, fault=ConfigError)
        parts[name] = kind.from_json(data, str(folder / path))
    try:
        return ModelConfig(**parts, defaults=DefaultsConfig.of(parts["scheduler"]))
    except ConfigError as fault:
        raise ConfigError(f"{folder}: {fault}") from None


def open_component_folder(component: str, folder: Path) -> Component:
    """A component from its folder: the shards listed in the index, or one file.

    Raises ConversionError if there are neither or they are damaged, ForeignError if the tensors are
    another model's.
    """
    stem = WEIGHTS[component]
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if kind_of(index, ConversionError):
        return open_files(component, [folder / shard for shard in shard_names(index)])
    if kind_of(single, ConversionError):
        return open_files(component, [single])
    pickles = [p.name for p in folder.glob("*.bin")]
    hint = (
        f"{printable(pickles[0])} is a pickle and is not opened; save as safetensors"
        if pickles
        else "is this the whole folder?"
    )
    raise ConversionError(f"{folder}: expected {single.name} or {index.name}; {hint}")


def shard_names(index: Path) -> list[str]:
    """The names of the files beside an index that it lists, sorted. Raises ConversionError."""
    names = read_json(index, _LARGEST_INDEX, ConversionError).get("weight_map")
    files = list(names.values()) if isinstance(names, dict) else []
    if not files or not all(isinstance(file, str) for file in files):
        raise ConversionError(f"{index}: expected a weight_map from tensor names to shard files")
    shards = sorted(set(files))
    for shard in shards:
        is_name = Path(shard).name == shard and shard.isprintable() and len(shard) <= 200
        if not is_name or not shard.endswith(".safetensors"):
            raise ConversionError(
                f"{index}: '{printable(shard)}' is not the name of a safetensors file beside it"
            )
    return shards


def open_file(component: str, path: Path) -> Component:
    """A component from one file, which may have the others too. Raises as open_component_folder."""
    return open_files(component, [path])


def open_files(
    component: str, files: list[Path], read: Callable[[Path], Header] | None = None
) -> Component:
    """A component from its files; tensors of other components in the same files are skipped.

    `read`: gives a file's header instead of `read_header`. Raises as open_component_folder.
    """
    headers = {file: (read or read_header)(file) for file in files}
    tensors = [tensor for header in headers.values() for tensor in header.tensors]
    own = [t for t in tensors if not t.name.startswith(_OF_OTHER_MODELS[component])]
    prefix = _PREFIXES[component]
    layers: dict[str, Any] = {}
    for file, header in headers.items():
        layers |= quantised.layers_of(header.metadata, file)
    result = Component(component, "")
    for tensor in own:
        bare = prefix.sub("", tensor.name, count=1)
        if bare in result.tensors:
            result.duplicates.append(tensor)
        result.tensors[bare] = tensor
    names = list(result.tensors) or [t.name for t in tensors]
    result.layout = _layout(component, names, files[0])
    bare_layers = {prefix.sub("", name, count=1): given for name, given in layers.items()}
    result.tensors = quantised.merged(result.tensors, bare_layers)
    result.metadata = {k: v for header in headers.values() for k, v in header.metadata.items()}
    return result


def read_header(file: Path) -> Header:
    """The header of a safetensors or GGUF file. Raises ConversionError if it is not a whole one."""
    with open_regular(file, ConversionError) as f:
        is_gguf = f.read(len(MAGIC)) == MAGIC
    return read_gguf(file) if is_gguf else read_safetensors(file)


def _layout(component: str, names: list[str], file: Path) -> str:
    """The layout that these tensor names have. Raises ForeignError if none."""

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    layouts = {
        "transformer": {
            "comfy": r"layers\.\d+\.attention\.qkv\.weight",
            "diffusers": r"layers\.\d+\.attention\.to_q\.weight",
        },
        "text_encoder": {"diffusers": r"layers\.\d+\.self_attn\.q_norm\.weight"},
        "vae": {"flux": r"decoder\.up\.\d+\..*", "diffusers": r"decoder\.up_blocks\.\d+\..*"},
    }[component]
    other = next((model for pattern, model in _OTHERS.items() if has(pattern)), None)
    if other is None:
        for layout, pattern in layouts.items():
            if has(pattern):
                return layout
    found = ", ".join(printable(name, 60) for name in sorted(names)[:2])
    what = f"these are tensors of {other}" if other else f"found {found or 'no tensors'}"
    raise ForeignError(f"{file}: not Z-Image's {component.replace('_', ' ')}; {what}")
