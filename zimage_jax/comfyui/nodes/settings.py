"""What the widgets say, as the keys of a job. Nothing of ComfyUI or torch is imported here."""

from dataclasses import dataclass, field, replace
from typing import Any

GIB = 1 << 30
MULTIPLE = 16  # of a picture's sides, in pixels
MODES = ("auto", "resident", "streamed")
SAMPLERS = ("euler", "dpmpp_2m", "res_multistep", "heun", "euler_ancestral")
SIGMAS = ("simple", "sgm_uniform", "beta", "linear_quadratic")
STRENGTH_RULES = ("noise", "diffusers", "comfyui")
KV_DTYPES = ("default", "bf16", "fp16", "bf16:fp16", "float32", "int8", "int6", "k5v6", "fp8:fp16")
DECODES = ("exact", "tiled", "off")
LARGEST_SEED = 2**64 - 1
LARGEST_WEIGHT, LARGEST_SCALE = 100.0, 10.0  # of a LoRA, and of a control image
LORA_ENDING = ".safetensors"


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet's file, and what it makes the pictures follow."""

    file: str
    stamp: str  # of the file
    image: Any  # in bytes [1 or B, H, W, 3]
    scale: float


@dataclass(frozen=True)
class Pipe:
    """What the loader gives on: a model that is not open yet, where its parameters may be, and what
    it draws with."""

    model: str | None  # of --model; None is the tiny one
    stamp: str  # of the model's files: it is opened again when they have changed
    cap: int | None  # device bytes; None is what is free when the engine starts
    memory: dict[str, Any] = field(default_factory=dict)  # keys of zimage_jax.Memory
    pins: tuple[tuple[int, str], ...] = ()
    loras: tuple[tuple[str, float], ...] = ()  # names as the server lists them, and weights
    control: Control | None = None

    def with_pin(self, chunk: int, mode: str) -> "Pipe":
        """The last word on a chunk counts; auto leaves it to the plan."""
        others = tuple(pin for pin in self.pins if pin[0] != chunk)
        return replace(self, pins=others if mode == "auto" else (*others, (chunk, mode)))

    def with_lora(self, file: str, weight: float) -> "Pipe":
        """Added to those before. `file`: as ComfyUI lists it."""
        name = file.replace("\\", "/").removesuffix(LORA_ENDING)
        return replace(self, loras=(*self.loras, (name, weight)))

    def with_control(self, control: Control) -> "Pipe":
        """Raises ValueError for a second one."""
        if self.control is not None:
            raise ValueError("this pipe has a ControlNet already: a picture follows one")
        return replace(self, control=control)

    def loras_of_job(self) -> list[dict[str, Any]]:
        return [{"name": name, "weight": weight} for name, weight in self.loras]

    def memory_of_job(self, cap: int | None, **own: Any) -> dict[str, Any]:
        """The job's memory options. `own`: of the job; None where it says nothing."""
        found = self.memory | {name: value for name, value in own.items() if value is not None}
        if cap is not None:
            found["max_vram_bytes"] = cap
        if self.pins:
            found["pins"] = [list(pin) for pin in self.pins]
        return found


def pipe_of(
    model: str | None,
    stamp: str,
    *,
    chunk_count: int,
    max_chunk_memory: float,
    max_vram: float,
    text_encoder_offload: bool,
    text_branch_always_loaded: bool,
    host_memory: float,
) -> Pipe:
    """The loader's widgets: sizes in GiB, 0 where nothing is said. Raises ValueError."""
    check_text_branch(text_encoder_offload, text_branch_always_loaded)
    memory: dict[str, Any] = {"chunks_on_device": chunk_count}
    if max_chunk_memory:
        memory["max_chunk_bytes"] = int(max_chunk_memory * GIB)
    if text_encoder_offload or text_branch_always_loaded:
        memory["text_encoder"] = "staged" if text_encoder_offload else "device"
    if host_memory:
        memory["host_bytes"] = int(host_memory * GIB)
    return Pipe(model, stamp, int(max_vram * GIB) or None, memory)


def check_text_branch(offload: bool, always: bool) -> None:
    if offload and always:
        raise ValueError(
            "text_encoder_offload streams the text encoder, text_branch_always_loaded keeps it on the "
            "device: turn one of them off"
        )


def schedule_of(
    *,
    steps: int,
    shift: float,
    sampler: str,
    sigmas: str,
    kv_group: str,
    kv_dtype: str,
    kv_switch_t: float,
    kv_reuse: int,
    dynamic_prefetch: bool,
) -> dict[str, Any]:
    """The scheduler's widgets: keys of a job, and its prefetch. The K/V policy changes the picture
    and so is named only where it says something."""
    kv: dict[str, Any] = {}
    if kv_dtype != "default":
        kv["dtype"] = kv_dtype
    if ":" in kv_dtype or ":" in kv_group:  # else there is nothing to switch
        kv["switch_t"] = kv_switch_t
    if kv_group != "1":
        kv["group"] = kv_group
    if kv_reuse > 1:
        kv["reuse"] = kv_reuse
    found: dict[str, Any] = {"steps": steps, "shift": shift, "sampler": sampler, "sigmas": sigmas}
    if kv:
        found["kv"] = kv
    return found | {"prefetch": None if dynamic_prefetch else 0}


def check_size(width: int, height: int) -> str | None:
    """What is wrong with a size, in one sentence."""
    for name, value in (("width", width), ("height", height)):
        if isinstance(value, int) and value % MULTIPLE:
            nearest = max(MULTIPLE, round(value / MULTIPLE) * MULTIPLE)
            return f"{name} {value}: expected a multiple of {MULTIPLE}, as {nearest}"
    return None


def text_of(prompt: str, prompt_weights: bool) -> str:
    """The prompt for the engine. Where brackets are text, ComfyUI's encoder too takes the backslash
    from \\( and \\), which other models need (comfy/sd1_clip.py escape_important)."""
    return prompt if prompt_weights else prompt.replace(r"\(", "(").replace(r"\)", ")")


def prompts_of(text: str) -> list[str]:
    """A prompt a line; empty lines and lines after # are left out."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def seeds_from(first: int, count: int) -> list[int]:
    """A seed for each picture, counting up from the first, and on from 0 beyond the largest."""
    return [(first + number) % (LARGEST_SEED + 1) for number in range(count)]


def seed_to_json(seed: int) -> int | str:
    """JSON's numbers are exact up to 2^53."""
    return seed if seed <= 2**53 else str(seed)


def line_of_plan(event: dict[str, Any]) -> str:
    """The line that the article's sampler shows, and the peak."""
    peak = event["predicted_peak_bytes"] / GIB
    return f"[Chunk Mode: {event['mode']}] predicted peak {peak:.2f} GiB"


def line_of_end(reports: list[dict[str, Any]]) -> str:
    """What drawing took, of all pictures."""
    peak = max(report["peak_device_bytes"] for report in reports) / GIB
    seconds = max(report["seconds"]["total"] for report in reports)
    return f"drawn: peak {peak:.2f} GiB, {reports[0]['nfes']} NFEs, {seconds:.1f} s"
