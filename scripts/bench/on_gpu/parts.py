"""What is asked of a GPU, in order: groups of cells, each a process of its own. Touches no device."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

GIB, MIB = 2**30, 2**20
PROMPT = "a lighthouse in fog"


@dataclass(frozen=True)
class Scale:
    """How large everything is: on a GPU, or in a dry run on a CPU with the tiny model."""

    full: str = "full"  # models.folder_of
    short: str = "short"
    sizes: tuple[str, ...] = ("512x512", "1024x1024")
    tiny_size: str = "128x128"
    steps: int = 8
    blocks: int = 30
    caps: tuple[int, ...] = (768, 1024, 1536, 4096, 8192)  # MiB
    formats: tuple[str, ...] = ("lossless", "int8", "int8-hadamard")
    kernels: tuple[str, ...] = ("cudnn", "flash", "chunks")
    heads: dict[str, int] = field(default_factory=lambda: {"heads": 30, "width": 128})
    tokens: tuple[int, ...] = (1152, 4224, 16512)
    races: int = 3
    first_runs: int = 12
    copied: int = 64 * MIB
    read: int = 4 * GIB
    is_dry: bool = False


DRY = Scale(
    full="tiny",
    short="tiny",
    sizes=("64x64",),
    tiny_size="64x64",
    steps=5,
    blocks=4,
    caps=(16,),
    formats=("lossless",),
    kernels=("chunks", "flash"),
    heads={"heads": 2, "width": 32},
    tokens=(64,),
    races=1,
    first_runs=2,
    copied=MIB,
    read=MIB,
    is_dry=True,
)


@dataclass(frozen=True)
class Group:
    """Cells that share a process. `seconds` is what they may take together, the model being there."""

    cells: list[dict[str, Any]]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    model: str | None = None  # that must be written first

    @property
    def part(self) -> str:
        return self.cells[0]["row"].partition("/")[0]


def groups(scale: Scale, rows: Mapping[str, dict], gpu_bytes: int | None) -> Iterator[Group]:
    """Everything, the most urgent first. `rows` by name are those so far: later groups read what
    earlier ones found."""
    yield from _races(scale)
    yield from _tiny(scale)
    yield from _full(scale)
    yield from _caps(scale, gpu_bytes)
    yield _attention(scale)
    yield _floors(scale)
    yield _rates(scale)
    yield from _reading(scale)
    yield from _options(scale)
    yield from _allocators(scale, rows, gpu_bytes)
    yield from _formats(scale, gpu_bytes)
    yield from _pictures(scale)


def _races(scale: Scale) -> Iterator[Group]:
    kernel = scale.kernels[0]
    shared = {
        "do": "race",
        "threads": 4,
        "nbytes": scale.copied,
        "first_runs": scale.first_runs,
        **scale.heads,
    }
    log = {"CUDNN_FRONTEND_LOG_INFO": "1", "CUDNN_FRONTEND_LOG_FILE": "/tmp/cudnn_frontend.log"}
    no_buffers = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}
    ways: list[tuple[str, str, bool, dict]] = [
        *[(f"{kernel} without the gate, {k + 1}", kernel, False, {}) for k in range(scale.races)],
        *[(f"{kernel} under the gate, {k + 1}", kernel, True, {}) for k in range(scale.races)],
    ]
    if not scale.is_dry:
        ways += [
            (f"{kernel} without the gate, no command buffers", kernel, False, no_buffers),
            (f"{kernel} under the gate, with cuDNN's log", kernel, True, log),
            ("flash without the gate", "flash", False, {}),
        ]
    for name, attention, gated, environment in ways:
        cell = {"row": f"race/{name}", **shared, "attention": attention, "gated": gated}
        if environment is log:
            cell["log"] = log["CUDNN_FRONTEND_LOG_FILE"]
        yield Group([cell], 30, environment)


def _picture(row: str, scale: Scale, model: str, size: str, **words) -> dict:
    cell = {"row": row, "do": "picture", "model": model, "size": size, "steps": scale.steps}
    return cell | {"prompt": PROMPT, "seed": 1, "repeats": 1, "dtype": "bfloat16"} | words


def _tiny(scale: Scale) -> Iterator[Group]:
    """Equal bits under all schedules, and of processes in which four threads read at once."""
    ways: dict[str, dict] = {
        "resident": {},
        "ring": {"chunks": 8},
        "hybrid": {"chunks": 8, "resident_chunks": 3},
        "swap": {"chunks": 4},
        "scan": {},
    }
    like = {"like": "tiny/resident"}
    yield Group(
        [
            _picture(f"tiny/{name}", scale, "tiny", scale.tiny_size, schedule=name, **words, **like)
            for name, words in ways.items()
        ],
        90,
    )
    for k in range(0 if scale.is_dry else 3):
        name = f"tiny/resident, process {k + 2}"
        yield Group(
            [_picture(name, scale, "tiny", scale.tiny_size, schedule="resident", **like)], 40
        )


def _full(scale: Scale) -> Iterator[Group]:
    ways: dict[str, dict] = {
        "resident": {"schedule": "resident"},
        "ring": {"schedule": "ring", "chunks": scale.blocks},
        "ring of halves": {"schedule": "ring", "chunks": 2 * scale.blocks},
    }
    cells = [
        _picture(
            f"full/{name} {size}", scale, scale.full, size, like=f"full/resident {size}", **words
        )
        for size in scale.sizes
        for name, words in ways.items()
    ]
    yield Group(cells, 180, model=scale.full)


def _capped(cap: float, gpu_bytes: int | None) -> dict[str, str]:
    return {"XLA_CLIENT_MEM_FRACTION": f"{cap / gpu_bytes:.6f}"} if gpu_bytes else {}


def _caps(scale: Scale, gpu_bytes: int | None) -> Iterator[Group]:
    """The allocator is capped and the plan is auto's; on a CPU, whose allocator has no cap, the plan
    is for that budget."""
    for cap in scale.caps:
        words = {"max_vram_mib": cap} if scale.is_dry else {}
        cells = [
            _picture(
                f"caps/{cap} MiB {size}",
                scale,
                scale.full,
                size,
                like=f"full/resident {size}",
                **words,
            )
            for size in scale.sizes
        ]
        yield Group(cells, 100, _capped(cap * MIB, gpu_bytes), scale.full)


def _attention(scale: Scale) -> Group:
    cells = [
        {
            "row": f"attention/{kernel} {tokens} tokens",
            "do": "attention",
            "attention": kernel,
            "tokens": tokens,
            **scale.heads,
        }
        for tokens in scale.tokens
        for kernel in scale.kernels
    ]
    return Group(cells, 60)


def _floors(scale: Scale) -> Group:
    cells = [
        _picture(
            f"{part}/ring {size}",
            scale,
            scale.full,
            size,
            schedule="ring",
            chunks=scale.blocks,
            do=part,
        )
        for part in ("floor", "hidden")
        for size in scale.sizes
    ]
    return Group(cells, 120, model=scale.full)


def _rates(scale: Scale) -> Group:
    cell: dict[str, Any] = {"row": "rates/device", "do": "rates", "dtype": "bfloat16"}
    if scale.is_dry:  # a card to stand for the CPU
        cell |= {"is_dry": True, "capability": [8, 9], "memory_bytes": 24 * GIB, "dtype": "float32"}
    return Group([cell], 40, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})


def _reading(scale: Scale) -> Iterator[Group]:
    """Into page-locked memory: PJRT copies through a buffer of its own, or is told not to."""
    shared = {"nbytes": scale.read, "model": scale.full}
    for staged in (True, False):
        client = {} if staged else {"client": {"should_stage_host_to_device_transfers": False}}
        words = "" if staged else ", not staged"
        cells: list[dict] = [
            {"row": f"reading/as jobs do{words}", "do": "reading units", **shared, **client}
        ]
        cells += [
            {
                "row": f"reading/{threads} threads, {'one buffer' if reuses else 'new memory'}{words}",
                "do": "reading",
                "threads": threads,
                "reuses": reuses,
                **shared,
                **client,
            }
            for threads in (1, 4)
            for reuses in (False, True)
        ]
        if staged or not scale.is_dry:  # a CPU's client has no such option
            yield Group(cells, 60, model=scale.full)


def _options(scale: Scale) -> Iterator[Group]:
    """Compile options, each in two processes: seconds per NFE, and whether the bits are the same."""
    fixed = ["xla_gpu_autotune_level", "xla_gpu_enable_triton_gemm"]
    ways: dict[str, dict] = {
        "ours": {},
        "autotuned": {"without": fixed},
        "ours, merged products": {"without": ["xla_gpu_dot_merger_threshold_mb"]},
        "ours, no command buffers": {"options": {"xla_gpu_enable_command_buffer": ""}},
    }
    for name, words in ways.items():
        for process in (1,) if scale.is_dry else (1, 2):
            cells = [
                _picture(
                    f"options/{name}, {size}, process {process}",
                    scale,
                    scale.short,
                    size,
                    schedule="resident",
                    like=f"options/{name}, {size}, process 1",
                    **words,
                )
                for size in scale.sizes
            ]
            yield Group(cells, 90, model=scale.short)


def _allocators(scale: Scale, rows: Mapping[str, dict], gpu_bytes: int | None) -> Iterator[Group]:
    """A ring under a cap of its ledger's peak and 3 %, which an exact allocator can keep."""
    size = scale.sizes[0]
    name = f"full/ring {size}"
    peak = rows.get(name, {}).get("ledger_peak_bytes")
    if peak is None:
        return
    async_ = {  # jax 0.11, and 0.10 with CUDA 13
        "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
        "JAX_PJRT_CLIENT_CREATE_OPTIONS": "allocator:cuda_async",
    }
    for allocator, environment in {"bfc": {}, "cuda_async": async_}.items():
        cell = _picture(
            f"allocator/{allocator}",
            scale,
            scale.full,
            size,
            schedule="ring",
            chunks=scale.blocks,
            max_vram_mib=1.03 * peak / MIB,
            like=f"full/resident {size}",
        )
        if not (scale.is_dry and environment):
            yield Group([cell], 60, environment | _capped(1.03 * peak, gpu_bytes), scale.full)


def _formats(scale: Scale, gpu_bytes: int | None) -> Iterator[Group]:
    """Seconds per NFE and the allocator's peak of each format: resident, and under the small caps.
    A lossless model's bits are those of the bfloat16 one."""
    for name in scale.formats:
        like = "full/resident" if name == "lossless" else f"formats/{name} resident"
        model = f"{scale.full}-{name}"

        def cells(way: str, name: str = name, model: str = model, like: str = like, **words):
            return [
                _picture(
                    f"formats/{name} {way} {size}",
                    scale,
                    model,
                    size,
                    like=f"{like} {size}",
                    **words,
                )
                for size in scale.sizes
            ]

        yield Group(cells("resident", schedule="resident"), 120, model=model)
        for cap in scale.caps[:3]:
            words = {"max_vram_mib": cap} if scale.is_dry else {}
            yield Group(cells(f"{cap} MiB", **words), 100, _capped(cap * MIB, gpu_bytes), model)


def _pictures(scale: Scale) -> Iterator[Group]:
    """Pictures from pictures: whole, in regions, and by a sampler with memory; bits as resident."""
    side = min(scale.sizes, key=len)
    half = int(side.partition("x")[0]) // 2
    ways: dict[str, dict] = {
        "image": {"strength": 0.6},
        "regions": {"strength": 0.6, "region": half},
        "res_multistep": {"sampler": "res_multistep"},
    }
    schedules = {"resident": {}, "ring": {"chunks": scale.blocks}}
    for name, words in ways.items():
        yield Group(
            [
                _picture(
                    f"pictures/{name} {schedule}",
                    scale,
                    scale.full,
                    side,
                    like=f"pictures/{name} resident",
                    schedule=schedule,
                    **words,
                    **chunks,
                )
                for schedule, chunks in schedules.items()
            ],
            120,
            model=scale.full,
        )
