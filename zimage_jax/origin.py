"""What the command's --from-image, --image and --enlarge begin from: settings and pictures."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .files import open_regular, printable

if TYPE_CHECKING:
    from .pipeline.canvas import Canvas

_SAME = ("negative_prompt", "width", "height", "steps", "guidance", "noise")
# metadata leaves these out where they are the default
_MAYBE = (
    *("attention", "sampler", "sigmas", "shift", "cfg_normalization", "cfg_truncation", "region"),
    *("prompt_weights", "text_weight", "variance"),
)
_STRENGTH = ("strength", "strength_rule", "differential")


@dataclass(frozen=True)
class Origin:
    """Settings that a picture's metadata gives to a job, and the picture that the job begins from.

    `flags`: arguments of `ZImage.canvas` that the user gave.
    """

    flags: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    source: Any = None  # the picture to enlarge
    pick: int | None = None  # its seed on a contact sheet
    factor: float | None = None
    drawn_from: dict[str, Any] = field(default_factory=dict)  # of a repeated picture's metadata
    control: dict[str, Any] = field(default_factory=dict)  # likewise: its ControlNet and image
    folder: Path | None = None  # where its files are looked for
    files: tuple[Path, ...] = ()

    @classmethod
    def of(
        cls, flags: dict[str, Any], from_image: Path | None, enlarge: float | None, pick: int | None
    ) -> "Origin":
        """Raises UsageError for flags that contradict each other, or a picture that is not ours."""
        files = tuple(p for p in (from_image, flags["image"], flags["mask"]) if p is not None)
        found = cls(flags, files=files)
        if from_image is None:
            for name, value in (("--enlarge", enlarge), ("--pick", pick)):
                if value is not None:
                    raise UsageError(f"{name} needs --from-image, the picture to enlarge")
            return found
        from .pipeline.picture import read_metadata
        from .pipeline.sheet import picked

        source: Any = from_image
        if pick is None:
            metadata = read_metadata(from_image)
        else:
            source = picked(from_image, pick)
            metadata, enlarge = source.metadata, enlarge or 2.0
        settings = _settings(metadata)
        if "control" in metadata:
            found = replace(found, control=metadata["control"])
        if enlarge is None:
            return replace(
                found,
                settings=settings,
                drawn_from=metadata.get("image", {}),
                folder=from_image.parent,
            )
        if flags["image"] is not None:
            raise UsageError("--enlarge begins from --from-image: --image cannot be given too")
        for name in ("width", "height", "region", *_STRENGTH):
            settings.pop(name, None)
        return replace(
            found,
            settings=settings,
            source=source,
            pick=pick,
            factor=enlarge,
            folder=from_image.parent,
        )

    def loras(self, given: list) -> list[tuple[Path, float]]:
        """The LoRAs with their weights: those that are given, else the repeated picture's, whose
        files lie beside it. Raises UsageError for one that is missing or another file."""
        found = []
        for row in given:
            if isinstance(row, tuple):
                found.append(row)
                continue
            assert self.folder is not None
            file = self.folder / Path(row["name"]).name
            if not file.is_file():
                raise UsageError(
                    f"--from-image was drawn with {printable(file.name)}, which is not beside it: "
                    "give it with --lora"
                )
            with open_regular(file) as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()  # type: ignore[arg-type]
            if digest != row["sha256"]:
                raise UsageError(
                    f"{printable(file.name)} is not the LoRA that --from-image was drawn with: its "
                    "checksum differs; give the right one with --lora"
                )
            found.append((file, row["weight"]))
        return found

    @property
    def begins_from_a_picture(self) -> bool:
        return bool(self.flags["image"] or self.source is not None or self.drawn_from)

    def canvas(self, pipe, job: dict) -> "Canvas | None":
        """The picture to begin from at the job's size; None for noise alone. Raises UsageError."""
        given = {name: value for name, value in self.flags.items() if value is not None}
        size = {"width": job["width"], "height": job["height"]}
        if self.source is not None:
            canvas = pipe.enlarged(self.source, self.factor, **given)
            if self.pick is None:
                return canvas
            return canvas.named(image=self.files[0].name, pick=self.pick)
        if "image" in given:
            return pipe.canvas(given.pop("image"), **size, **given)
        if self.drawn_from:
            return self._again(pipe, size, given)
        for name in given:
            raise UsageError(f"--{name.replace('_', '-')} needs --image: there is none")
        return None

    def check_control(self, control: Path | None, job: dict) -> None:
        """Fill in the control image of a repeated picture: it lies beside it. Raises UsageError for
        a ControlNet without an image, and the other way round."""
        if self.control and job["control_image"] is None:
            name = self.control["image"]
            assert self.folder is not None
            image = None if name is None else self.folder / Path(name).name
            if image is None or not image.is_file():
                what = "a picture without a name" if name is None else printable(name)
                raise UsageError(
                    f"--from-image follows {what}, which is not beside it: give it with "
                    "--control-image"
                )
            job["control_image"] = image
        if job["control_image"] is None:
            for flag, value in (("--control", control), ("--control-scale", job["control_scale"])):
                if value is not None:
                    raise UsageError(f"{flag} needs --control-image: there is none to follow")
        elif control is None:
            name = f", {printable(self.control['model'])}" if self.control else ""
            raise UsageError(f"--control-image needs --control, a ControlNet{name}")

    def control_canvas(self, pipe, job: dict) -> "Canvas":
        """The control image at the job's size. Raises UsageError, also for another than a repeated
        picture's."""
        if job.get("image") is not None:
            height, width = job["image"].pixels.shape[:2]
        else:
            width, height = job["width"], job["height"]
        is_the_same = job["control_image"].name == self.control.get("image")
        fit = {"fit": self.control["fit"]} if is_the_same else {}
        canvas = pipe.control_canvas(job["control_image"], width=width, height=height, **fit)
        own = self.settings.get("width"), self.settings.get("height")
        if is_the_same and (width, height) == own and canvas.sha256 != self.control["sha256"]:
            raise UsageError(
                f"{printable(job['control_image'].name)} is not the picture that --from-image "
                "follows: its checksum differs; give the right one with --control-image"
            )
        return canvas

    def _again(self, pipe, size: dict, given: dict) -> "Canvas":
        """The canvas of a repeated picture: its files lie beside it, by name and checksum."""
        from .pipeline.sheet import picked

        kept = {k: v for k, v in self.drawn_from.items() if v is not None}
        expected, missing = kept.pop("sha256"), None
        assert self.folder is not None
        for name in ("image", "mask"):
            if name in kept:
                kept[name] = self.folder / Path(kept[name]).name
                missing = missing or (None if kept[name].is_file() else kept[name])
        if missing is not None or "image" not in kept:
            what = "a picture without a name" if missing is None else printable(missing.name)
            raise UsageError(
                f"--from-image was drawn from {what}, which is not beside it: give it with --image"
            )
        arguments = {k: v for k, v in kept.items() if k not in (*_STRENGTH, "noise_level")}
        sheet, pick = arguments.pop("image"), arguments.pop("pick", None)
        image = sheet if pick is None else picked(sheet, pick).pixels
        canvas = pipe.canvas(image, **size, **(arguments | given))
        if pick is not None:
            canvas = canvas.named(image=sheet.name, pick=pick)
        is_as_it_was = not given and all(self.settings[name] == n for name, n in size.items())
        if is_as_it_was and canvas.sha256 != expected:
            raise UsageError(
                f"{printable(kept['image'].name)} is not the picture that --from-image was drawn "
                "from: its checksum differs; give the right one with --image"
            )
        return canvas


def _settings(metadata: dict) -> dict[str, Any]:
    """Of a picture's metadata, the settings of its job, under the job's keys."""
    of_image = metadata.get("image", {})
    return {
        "prompts": [metadata["prompt"]],
        "seeds": [metadata["seed"]],
        "kv": metadata.get("kv", {}),
        "lora": metadata.get("lora", []),
        "lora_merge": any(row.get("merged") for row in metadata.get("lora", [])) or None,
        **{key: metadata[key] for key in _SAME},
        **{key: metadata.get(key) for key in _MAYBE},
        **{key: of_image.get(key) for key in _STRENGTH},
        "control_scale": metadata.get("control", {}).get("scale"),
    }
