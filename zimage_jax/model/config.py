"""Frozen configs of the three components, read strictly from the published JSON files.

Attribute names are the published keys. Each key of a file is a field, inert (it changes no
arithmetic) or neutral (it would change arithmetic, so only the value that changes nothing is
accepted). Any other key is an error: a model that needs something this code lacks must not run
without it. Sizes are in elements (channels, layers, tokens) unless a comment gives another unit.
"""

import dataclasses
import reprlib
import typing
from dataclasses import dataclass, replace

from ..errors import ConfigError
from ..files import printable

# No Z-Image has larger numbers, and a hostile config could exhaust memory with them.
_LARGEST, _MOST_LAYERS = 1 << 20, 512
_MOST_FAULTS = 8  # listed in one message


def _read(cls, data, where: str, inert=(), neutral=None):
    """A `cls` from the JSON object `data`; `inert` and `neutral` as the module's docstring says.

    Raises ConfigError with all faults (at most _MOST_FAULTS of them are listed).
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    values, faults = {}, []
    for key, value in data.items():
        if key in hints:
            try:
                values[key] = _coerce(value, hints[key])
            except ValueError as fault:
                faults.append(f"{key} {fault}")
        elif neutral and key in neutral:
            if value not in neutral[key]:
                only = _shown(neutral[key][0])
                faults.append(f"{key} = {_shown(value)} is not supported (only {only})")
        elif key not in inert and not key.startswith("_"):
            faults.append(f"unknown key {_shown(key)} = {_shown(value)}")
    if len(faults) > _MOST_FAULTS:
        faults[_MOST_FAULTS:] = [f"and {len(faults) - _MOST_FAULTS} more"]
    faults += [f"key {name!r} is missing" for name in hints if name not in data]
    if faults:
        raise ConfigError(f"{where}: {'; '.join(faults)}")
    try:
        return cls(**values)
    except ConfigError as fault:
        raise ConfigError(f"{where}: {fault}") from None


def _shown(value) -> str:
    return printable(reprlib.repr(value), 60)  # reprlib stops after six levels of nesting


def _coerce(value, hint):
    """`value` as the type `hint`. The text of the ValueError continues a message after the key."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if hint is int and is_int and 0 < value <= _LARGEST:
        return value
    if hint is float and (is_int or isinstance(value, float)) and abs(value) < 1e30:
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    is_tuple = typing.get_origin(hint) is tuple
    if is_tuple and isinstance(value, list | tuple) and 0 < len(value) <= 16:
        return tuple(_coerce(v, int) for v in value)
    names = {int: f"a whole number from 1 to {_LARGEST}", float: "a number", str: "text"}
    raise ValueError(
        f"must be {names.get(hint, 'a short list of whole numbers')}, got {_shown(value)}"
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_layers(**counts: int) -> None:
    for name, count in counts.items():
        _require(count <= _MOST_LAYERS, f"{name} must be at most {_MOST_LAYERS}, got {count}")


@dataclass(frozen=True)
class DiTConfig:
    """The S3-DiT (diffusers `ZImageTransformer2DModel`). Defaults are Z-Image-Turbo's."""

    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    in_channels: int = 16
    cap_feat_dim: int = 2560
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1536, 512, 512)
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        _require_layers(n_layers=self.n_layers, n_refiner_layers=self.n_refiner_layers)
        _require(
            self.dim % self.n_heads == 0,
            f"dim {self.dim} is not a multiple of n_heads {self.n_heads}",
        )
        _require(
            len(self.axes_dims) == len(self.axes_lens) == 3
            and sum(self.axes_dims) == self.head_dim,
            f"axes_dims {self.axes_dims} must be three numbers that add up to "
            f"dim / n_heads = {self.head_dim}",
        )
        _require(
            all(d % 2 == 0 for d in self.axes_dims), f"axes_dims {self.axes_dims} must be even"
        )

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.dim // self.n_heads

    @property
    def ff_dim(self) -> int:
        """Width of the feed-forward: 8/3 of dim, rounded down."""
        return int(self.dim / 3 * 8)

    @property
    def adaln_dim(self) -> int:
        """Width of the time embedding."""
        return min(self.dim, 256)

    @property
    def patch_dim(self) -> int:
        """Values of a 2 x 2 patch of latents."""
        return 4 * self.in_channels

    @classmethod
    def from_json(cls, data: object, where: str = "transformer/config.json") -> "DiTConfig":
        """From the published JSON object; `where` begins each message. Raises ConfigError."""
        heads = None
        if isinstance(data, dict):
            heads = data.get("n_heads")
            _require(
                data.get("siglip_feat_dim") is None,
                f"{where}: siglip_feat_dim = {_shown(data.get('siglip_feat_dim'))}: "
                "Z-Image Omni or Edit, which are not supported",
            )
        neutral = {
            "n_kv_heads": [heads],
            "qk_norm": [True],
            "all_patch_size": [[2]],
            "all_f_patch_size": [[1]],
            "siglip_feat_dim": [None],
        }
        return _read(cls, data, where, neutral=neutral)

    def to_json(self) -> dict:
        """The JSON object that `from_json` reads."""
        return dataclasses.asdict(self) | {"n_kv_heads": self.n_heads, "qk_norm": True}


# What refines the control tokens before the main blocks, by the names of diffusers'
# `add_control_noise_refiner`: plain blocks (there None; Union 1.0), the control blocks that act on
# the main blocks (2.0), or blocks of its own that act on the noise refiner too (2.1)
REFINERS = "none", "control_layers", "control_noise_refiner"


@dataclass(frozen=True)
class ControlConfig:
    """A ControlNet Union of Z-Image (diffusers `ZImageControlNetModel`). Its blocks have the
    widths of the DiT that it controls, whose main blocks they follow at equal distances."""

    layers: int  # control blocks beside the main ones
    in_channels: int  # latents of the control image, and for inpainting a mask and latents more
    refiner: str  # one of REFINERS

    def __post_init__(self):
        _require_layers(layers=self.layers)
        _require(self.refiner in REFINERS, f"refiner must be one of {', '.join(REFINERS)}")

    def places(self, main: int) -> tuple[int, ...]:
        """The main blocks, of so many, that a control block follows. Raises ConfigError if they
        cannot be at equal distances."""
        _require(main % self.layers == 0, f"{self.layers} control blocks for {main} main blocks")
        return tuple(range(0, main, main // self.layers))

    @classmethod
    def from_json(cls, data: object, where: str = "control") -> "ControlConfig":
        """From an object that `to_json` wrote. Raises ConfigError."""
        return _read(cls, data, where)

    def to_json(self) -> dict:
        """The JSON object that `from_json` reads."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TextEncoderConfig:
    """Qwen3 (transformers `Qwen3Model`). Defaults are Z-Image-Turbo's Qwen3-4B."""

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6

    def __post_init__(self):
        _require_layers(num_hidden_layers=self.num_hidden_layers)
        _require(
            self.num_hidden_layers >= 2,
            "num_hidden_layers must be at least 2: the features are hidden_states[-2]",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even")

    @property
    def n_layers(self) -> int:
        """Layers that run: the features are the input of the last layer, which never runs."""
        return self.num_hidden_layers - 1

    @classmethod
    def from_json(
        cls, data: object, where: str = "text_encoder/config.json"
    ) -> "TextEncoderConfig":
        """From the published JSON object; `where` begins each message. Raises ConfigError."""
        neutral = {
            "hidden_act": ["silu"],
            "attention_bias": [False],
            "model_type": ["qwen3"],
            "rope_scaling": [None],
            "rope_type": ["default"],
            "use_sliding_window": [False],
            "sliding_window": [None],
        }
        inert = {
            "architectures",
            "attention_dropout",
            "bos_token_id",
            "dtype",
            "eos_token_id",
            "initializer_range",
            "max_position_embeddings",
            "max_window_layers",
            "pad_token_id",
            "tie_word_embeddings",
            "torch_dtype",
            "transformers_version",
            "use_cache",
            "partial_rotary_factor",
        }
        if isinstance(data, dict):
            data = dict(data)
            # transformers >= 5 nests rope_theta and rope_type, older versions do not
            rope = data.pop("rope_parameters", None)
            if isinstance(rope, dict):
                data |= rope
            layers = data.pop("layer_types", None) or ["full_attention"]
            _require(
                isinstance(layers, list) and all(layer == "full_attention" for layer in layers),
                f"{where}: layer_types {_shown(layers)} must all be 'full_attention'",
            )
            _require(
                data.get("partial_rotary_factor", 1.0) == 1.0,
                f"{where}: partial_rotary_factor must be 1.0",
            )
        return _read(cls, data, where, inert, neutral)

    def to_json(self) -> dict:
        """The JSON object that `from_json` reads."""
        return dataclasses.asdict(self) | {"model_type": "qwen3"}


@dataclass(frozen=True)
class VAEConfig:
    """The Flux VAE (diffusers `AutoencoderKL`). Defaults are Z-Image-Turbo's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    sample_size: int = 1024  # pixels: a picture's default width and height

    def __post_init__(self):
        _require_layers(layers_per_block=self.layers_per_block)
        _require(
            len(self.block_out_channels) <= 6, "block_out_channels must be at most six numbers"
        )
        _require(
            all(c % self.norm_num_groups == 0 for c in self.block_out_channels),
            f"block_out_channels {self.block_out_channels} must be multiples of norm_num_groups "
            f"{self.norm_num_groups}",
        )
        _require(self.scaling_factor != 0, "scaling_factor must not be 0")
        _require(
            self.in_channels == self.out_channels == 3,
            "in_channels and out_channels must be 3 (RGB)",
        )

    @property
    def scale(self) -> int:
        """Pixels per latent along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, data: object, where: str = "vae/config.json") -> "VAEConfig":
        """From the published JSON object; `where` begins each message. Raises ConfigError."""
        channels = data.get("block_out_channels") if isinstance(data, dict) else None
        levels = len(channels) if isinstance(channels, list | tuple) else 0
        neutral = {
            "act_fn": ["silu"],
            "down_block_types": [["DownEncoderBlock2D"] * levels],
            "up_block_types": [["UpDecoderBlock2D"] * levels],
            "use_quant_conv": [False],
            "use_post_quant_conv": [False],
            "mid_block_add_attention": [True],
            "latents_mean": [None],
            "latents_std": [None],
        }
        return _read(cls, data, where, {"force_upcast"}, neutral)

    def to_json(self) -> dict:
        """The JSON object that `from_json` reads."""
        return dataclasses.asdict(self)


TURBO_SHIFT, BASE_SHIFT = 3.0, 6.0


@dataclass(frozen=True)
class SigmasConfig:
    """The one parameter of the published scheduler that the sampler uses (diffusers
    `FlowMatchEulerDiscreteScheduler`)."""

    shift: float = TURBO_SHIFT

    def __post_init__(self):
        _require(self.shift > 0, f"shift must be positive, got {self.shift}")

    @classmethod
    def from_json(
        cls, data: object, where: str = "scheduler/scheduler_config.json"
    ) -> "SigmasConfig":
        """From the published JSON object; `where` begins each message. Raises ConfigError."""
        neutral = {
            "num_train_timesteps": [1000],
            "use_dynamic_shifting": [False],
            "invert_sigmas": [False],
            "shift_terminal": [None],
            "stochastic_sampling": [False],
            "use_beta_sigmas": [False],
            "use_exponential_sigmas": [False],
            "use_karras_sigmas": [False],
        }
        inert = {
            "base_image_seq_len",
            "base_shift",
            "max_image_seq_len",
            "max_shift",
            "time_shift_type",
        }
        return _read(cls, data, where, inert, neutral)

    def to_json(self) -> dict:
        """The JSON object that `from_json` reads."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class DefaultsConfig:
    """The number of NFEs and the guidance of a job that does not set them."""

    steps: int = 8
    guidance: float = 0.0

    def __post_init__(self):
        _require(self.steps <= 1000, f"steps must be at most 1000, got {self.steps}")
        _require(0 <= self.guidance <= 100, f"guidance must be from 0 to 100, got {self.guidance}")

    @classmethod
    def of(cls, sigmas: SigmasConfig) -> "DefaultsConfig":
        """A published model's defaults, recognised by its shift: 3 for Turbo, 6 for the base model.

        Their configs differ in nothing else.
        """
        return cls() if sigmas.shift == TURBO_SHIFT else cls(28, 4.0)

    @classmethod
    def from_json(cls, data: object, where: str = "defaults") -> "DefaultsConfig":
        """From an object that `to_json` wrote. Raises ConfigError."""
        return _read(cls, data, where)

    def to_json(self) -> dict:
        """The JSON object that `from_json` reads."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ModelConfig:
    """The configs of one checkpoint: three components, the scheduler and the defaults; and of what
    controls the transformer, which is a checkpoint of its own."""

    transformer: DiTConfig = DiTConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    vae: VAEConfig = VAEConfig()
    scheduler: SigmasConfig = SigmasConfig()
    defaults: DefaultsConfig = DefaultsConfig()
    control: ControlConfig | None = None

    def __post_init__(self):
        _require(
            self.transformer.cap_feat_dim == self.text_encoder.hidden_size,
            f"the transformer takes features of width {self.transformer.cap_feat_dim}, "
            f"the text encoder gives {self.text_encoder.hidden_size}",
        )
        _require(
            self.transformer.in_channels == self.vae.latent_channels,
            f"the transformer takes {self.transformer.in_channels} latent channels, "
            f"the VAE has {self.vae.latent_channels}",
        )
        if self.control is not None:
            self._check_control(self.control)

    def _check_control(self, control: ControlConfig) -> None:
        dit = self.transformer
        control.places(dit.n_layers)
        _require(
            control.in_channels >= dit.in_channels,
            f"the control takes {control.in_channels} channels, the VAE gives {dit.in_channels}",
        )
        _require(
            control.refiner != "control_layers" or control.layers >= dit.n_refiner_layers,
            f"{control.layers} control blocks for {dit.n_refiner_layers} blocks of the refiner",
        )

    @property
    def pixel_multiple(self) -> int:
        """Width and height in pixels must be multiples of this: VAE scale times patch size 2."""
        return 2 * self.vae.scale

    @classmethod
    def from_json(cls, data: dict, where: str = "config") -> "ModelConfig":
        """From an object with one key per field, as `to_json` writes it. Raises ConfigError.

        Checkpoints of version 1 have no "defaults".
        """
        parts = typing.get_type_hints(cls)
        del parts["control"]
        _require(
            isinstance(data, dict) and parts.keys() - {"defaults"} <= data.keys() <= parts.keys(),
            f"{where}: expected the keys {sorted(parts)}",
        )
        read = {
            name: parts[name].from_json(part, f"{where}, {name}") for name, part in data.items()
        }
        return cls(**{"defaults": DefaultsConfig.of(read["scheduler"])} | read)

    def to_json(self) -> dict:
        """The JSON object that `from_json` reads; without `control`."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "control"]
        return {name: getattr(self, name).to_json() for name in names}


TURBO = ModelConfig()
_BASE = SigmasConfig(BASE_SHIFT)
BASE = replace(TURBO, scheduler=_BASE, defaults=DefaultsConfig.of(_BASE))
PRESETS = {
    "turbo": TURBO,
    "base": BASE,
    # 24 blocks make four equal chunks of 6
    "turbo-24": replace(TURBO, transformer=replace(TURBO.transformer, n_layers=24)),
}
# the published ControlNet Unions, for Turbo and the base model
CONTROLS = {
    "union-1.0": ControlConfig(6, 16, "none"),
    "union-2.0": ControlConfig(15, 33, "control_layers"),
    "union-2.1": ControlConfig(15, 33, "control_noise_refiner"),
    "union-2.1-lite": ControlConfig(3, 33, "control_noise_refiner"),
}
