"""The page at /: a Gradio form over the queue that the APIs have.

The browser sends pictures as text beside the form, and shows ours by their addresses: Gradio neither
takes nor serves a file.
"""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Mapping
from importlib.resources import files
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read at the import

import gradio as gr
import numpy as np
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import UsageError, ZImageError
from ...model.choices import MOST_LORAS
from ...model.samplers import SAMPLERS
from ...pipeline.opened import check_pixels
from ...pipeline.picture import encode_png, metadata_in
from ...pipeline.size import parse_size
from ..errors import RefusedError, invalid
from ..jobs import Jobs
from ..memory import estimate
from ..native import make_order
from ..order import LONGEST_PROMPT, MOST_PIXELS, Drawing, Order, from_base64, order
from ..store import ACCEPTED
from . import form, parts
from .words import LANGUAGES, Words, words_for

_PAGE = 24  # jobs of the history at once
_FACTOR = 2.0  # of "enlarge this"
_REFRESH = 0.3  # seconds between two looks at what runs
_SHOWN = 8  # jobs in flight that are shown
# what the page asks Gradio for; its uploads, files, proxy and other doors stay shut
_PATHS = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json)|/(assets|static|svelte)/[^?]*"
    r"|/gradio_api/(queue/(join|data)|heartbeat/\w+|cancel|reset|startup-events|info|app_id)/?"
)
_CANVAS = """
<div class="z-drop" tabindex="0"><label><input type="file" accept="image/*"><span data-word="open_picture"></span></label>
<div class="z-stage"><img alt=""><canvas></canvas></div>
<div class="z-tools"><span data-word="mask_hint"></span><label><span data-word="brush"></span>
<input type="range" min="4" max="120" value="32"></label><button type="button" class="z-clear" data-word="clear"></button>
<button type="button" class="z-without" data-word="without"></button></div></div>"""
_REUSE = """
<div class="z-drop" tabindex="0"><label><input type="file" accept="image/png"><span data-word="reuse_picture"></span></label>
<p data-word="reuse_hint"></p></div>"""
_MEMORY = """
<div><div class="z-strip" role="img"></div><div class="z-legend"></div></div>"""


def mount(app: FastAPI, jobs: Jobs) -> None:
    """Show the page at /, and nothing else of Gradio's. Call it after every other route is there."""
    here = files(__package__)
    words = json.dumps(LANGUAGES, ensure_ascii=False)
    script = (here / "page.js").read_text("utf-8").replace("/* words */", words)
    gr.mount_gradio_app(
        app,
        Page(jobs).blocks,
        "/",
        css=(here / "page.css").read_text("utf-8"),
        head=f"<script>{script}</script>",
        i18n=gr.I18n(**{"en": LANGUAGES["en"], "zh": LANGUAGES["zh"], "zh-CN": LANGUAGES["zh"]}),  # type: ignore[arg-type]
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,
    )
    route = app.router.routes[-1]
    assert isinstance(route, Mount)
    route.app = _Only(route.app)


class _Only:
    """Gradio's app behind the paths that the page needs."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _PATHS.fullmatch(scope["path"]):
            await RefusedError(404, "no such path", "not_found").response(scope["path"])(
                scope, receive, send
            )
        else:
            await self._app(scope, receive, send)


def _words(request: gr.Request) -> Words:
    return words_for(request.headers.get("accept-language", ""))


class Page:
    """The form and what its buttons do."""

    def __init__(self, jobs: Jobs):
        self._jobs, self._engine = jobs, jobs.engine
        self._first = form.defaults(self._engine.config, self._engine.memory)
        config = self._engine.config
        widest = min(config.transformer.axes_lens[1:]) * config.pixel_multiple
        self._most = min(4 * config.vae.sample_size, widest)  # pixels of a side
        with gr.Blocks(title="zimage_jax", analytics_enabled=False) as self.blocks:
            self._lay_out()
            self._connect()
        self.blocks.queue(default_concurrency_limit=None, api_open=False)

    # -- what there is -----------------------------------------------------------------------------

    def _lay_out(self) -> None:
        word = gr.I18n(**LANGUAGES)  # type: ignore[arg-type]
        gr.HTML(f"<h1>zimage_jax</h1>{parts.line(self._engine.name)}")
        self._rest = gr.State({})  # settings of a picture that the form has no field for
        self._last = gr.State("-1")  # seed
        self._begins, self._length = gr.State(False), gr.State(_PAGE)
        self._chosen = gr.Textbox(visible=False)
        self._fields: dict[str, Any] = {}
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                self._add_form(word)
            with gr.Column(scale=6, min_width=340):
                self._strip = gr.HTML(
                    html_template=_MEMORY, js_on_load="zimage.memory(element)", label=word("memory")
                )
                self._now = gr.HTML(js_on_load="zimage.actions(element, trigger)", elem_id="z-now")
                gr.Markdown(word("history"))
                self._history = gr.HTML(
                    js_on_load="zimage.actions(element, trigger)", elem_id="z-history"
                )
                self._more = gr.Button(word("more"), size="sm")

    def _add_form(self, word: gr.I18n) -> None:
        config, first, add = self._engine.config, self._first, self._fields
        multiple, side = config.pixel_multiple, config.vae.sample_size
        add["prompt"] = gr.Textbox(
            lines=3,
            max_length=LONGEST_PROMPT,
            label=word("prompt"),
            placeholder=word("prompt_hint"),
            elem_id="z-prompt",
        )
        add["negative_prompt"] = gr.Textbox(
            lines=1, max_length=LONGEST_PROMPT, label=word("negative_prompt")
        )
        with gr.Row():
            self._presets = [
                (gr.Button(name, size="sm", min_width=60), size)
                for name, size in presets(side, multiple, self._most)
            ]
        with gr.Row():
            for name in ("width", "height"):
                add[name] = gr.Slider(
                    multiple,
                    self._most,
                    first[name],
                    step=multiple,
                    label=word(name),
                    min_width=140,
                )
        with gr.Row():
            add["count"] = gr.Slider(1, 4, 1, step=1, label=word("count"), min_width=140)
            add["steps"] = gr.Slider(
                1, 50, first["steps"], step=1, label=word("steps"), min_width=140
            )
        with gr.Row():
            add["seed"] = gr.Textbox(
                "-1", label=word("seed"), info=word("seed_info"), min_width=140
            )
            with gr.Column(min_width=140):
                self._new = gr.Button(word("new_seed"), size="sm")
                self._reuse = gr.Button(word("reuse"), size="sm")
        self._plan = gr.HTML(elem_id="z-plan")
        self._told = gr.HTML(elem_id="z-told")
        self._draw = gr.Button(word("draw"), variant="primary", elem_id="z-draw")
        self._add_folded(word)

    def _add_folded(self, word: gr.I18n) -> None:
        """The parts of the form that are folded at first."""
        first, add = self._first, self._fields
        with gr.Accordion(word("pictures"), open=False):
            self._canvas = gr.HTML(
                html_template=_CANVAS,
                js_on_load="zimage.canvas(element.querySelector('.z-drop'), trigger)",
            )
            add["strength"] = gr.Slider(
                0.05,
                1,
                first["strength"],
                step=0.05,
                label=word("strength"),
                info=word("strength_info"),
            )
        with gr.Accordion(word("settings"), open=False):
            add["guidance"] = gr.Slider(
                0,
                10,
                first["guidance"],
                step=0.1,
                label=word("guidance"),
                info=word("guidance_info"),
            )
            add["sampler"] = gr.Dropdown(
                list(SAMPLERS), value=first["sampler"], label=word("sampler")
            )
            self._dropped = gr.HTML(
                html_template=_REUSE,
                js_on_load="zimage.reuse(element.querySelector('.z-drop'), trigger)",
            )
            self._reset = gr.Button(word("reset"), size="sm")
        self._add_loras(word)
        with gr.Accordion(word("memory"), open=False):
            for name in ("text_encoder", "low_vram"):
                add[name] = gr.Checkbox(first[name], label=word(name), info=word(f"{name}_info"))
            for name, most in (("chunks", 10_000), ("vae_tile", 16384)):
                add[name] = gr.Number(
                    first[name],
                    precision=0,
                    minimum=0,
                    maximum=most,
                    label=word(name),
                    info=word(f"{name}_info"),
                )

    def _add_loras(self, word: gr.I18n) -> None:
        first, add = self._first, self._fields
        with gr.Accordion("LoRA", open=False, visible=bool(self._jobs.loras.folders)):
            # a picture may name others, which are refused by name
            add["loras"] = gr.Dropdown(
                [],
                value=[],
                multiselect=True,
                allow_custom_value=True,
                max_choices=MOST_LORAS,
                label=word("loras"),
                info=word("loras_info"),
                elem_id="z-loras",
            )
            add["lora_weight"] = gr.Slider(
                -form.LARGEST_WEIGHT,
                form.LARGEST_WEIGHT,
                first["lora_weight"],
                step=0.05,
                label=word("lora_weight"),
            )

    def _connect(self) -> None:
        fields = [self._fields[name] for name in form.FIELDS]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        settings = [self._rest, *fields]
        seen = [self._now, self._history]
        looked = [self._told, self._rest, *fields]
        for button, size in self._presets:
            button.click(
                None,
                None,
                [self._fields["width"], self._fields["height"]],
                js=f"() => {list(size)}",
            )
        self._new.click(lambda: "-1", None, self._fields["seed"], **hidden)
        self._reuse.click(lambda seed: seed, self._last, self._fields["seed"], **hidden)
        self._reset.click(self.reset, None, looked, **hidden)
        self._canvas.change(
            self.begin,
            None,
            [self._begins, self._told, self._fields["width"], self._fields["height"]],
            **hidden,
        )
        self._canvas.clear(lambda: False, None, self._begins, **hidden)
        self._dropped.upload(self.refill, None, looked, **hidden)
        planned = [f for name, f in self._fields.items() if name not in ("prompt", "seed")]
        gr.on(
            [
                self.blocks.load,
                self._rest.change,
                self._begins.change,
                *(f.change for f in planned),
            ],
            self.plan,
            [self._begins, *settings],
            self._plan,
            trigger_mode="always_last",
            **hidden,
        )
        pressed = gr.on(
            [self._draw.click],
            self.draw,
            [self._chosen, *settings],
            [self._told, self._last],
            js="(chosen, ...rest) => [zimage.chosen(), ...rest]",
            trigger_mode="multiple",
            **hidden,
        )
        acted = [
            part.click(self.act, None, [*looked, self._history], trigger_mode="multiple", **hidden)
            for part in seen
        ]
        for trigger in (self.blocks.load, pressed.then, *(did.then for did in acted)):
            trigger(self.watch, self._length, seen, trigger_mode="always_last", **hidden)
        self.blocks.load(self.list_loras, None, self._fields["loras"], **hidden)
        self._more.click(self.show_more, self._length, [self._length, self._history], **hidden)

    # -- what it does ------------------------------------------------------------------------------

    async def draw(self, chosen: str, rest: dict, *values: Any) -> tuple[str, Any]:
        jobs = self._jobs
        try:
            jobs.check_intake()
            made = await jobs.aside(self._order, values, rest, _pictures(chosen))
            await jobs.accept(made)
        except (ZImageError, RefusedError) as fault:
            return parts.line(str(fault), "z-bad"), gr.skip()
        return "", str(made.seeds[0])

    async def plan(self, begins: bool, rest: dict, request: gr.Request, *values: Any) -> str:
        """What the form would take."""
        try:
            made = await self._jobs.aside(self._planned, begins, rest, values)
            return parts.plan(await estimate(self._jobs, made), _words(request))
        except (ZImageError, RefusedError) as fault:
            return parts.line(str(fault), "z-bad")

    def _planned(self, begins: bool, rest: dict, values: tuple) -> Order:
        fields = dict(zip(form.FIELDS, values, strict=True))
        made = self._order(values, rest, {}, prompt=fields["prompt"] or "a")
        if not begins:
            return made
        size = [made.arguments[name] for name in ("width", "height")]
        check_pixels("the picture", size[0], size[1], MOST_PIXELS)
        blank = np.zeros((size[1], size[0], 3), np.uint8)
        return self._order(
            values, rest, {"image": encode_png(blank)}, prompt=fields["prompt"] or "a"
        )

    def _order(self, values: tuple, rest: dict, inputs: Mapping[str, bytes], **over: Any) -> Order:
        """The order of the form: call it in a thread. Raises UsageError and RefusedError."""
        fields = dict(zip(form.FIELDS, values, strict=True)) | over
        said = rest | form.arguments(fields, self._engine.memory, has_picture=bool(inputs))
        try:
            body = Drawing.model_validate(
                said | {"seed": fields["seed"], "count": form.whole(fields["count"])}
            )
        except ValidationError as fault:
            raise invalid([dict(error) for error in fault.errors()]) from None
        return make_order(self._jobs, body, "page", inputs)

    async def list_loras(self) -> Any:
        """The names of the folder now, with words that they were trained to hear."""
        try:
            rows = await self._jobs.aside(self._jobs.loras.describe)
        except UsageError:  # the folder has gone
            rows = []
        named = [row for row in rows if "error" not in row]
        return gr.update(choices=[(parts.lora(row), row["name"]) for row in named])

    async def watch(self, length: int, request: gr.Request) -> AsyncIterator[tuple[Any, Any]]:
        """What runs, until nothing does, and the history whenever a picture was added."""
        jobs, words = self._jobs, _words(request)
        now: str | None = None
        shown: list[tuple[str, int]] | None = None
        while True:
            live = list(jobs.live.values())
            text = parts.running(live[:_SHOWN], jobs, words)
            state = [(job.id, len(job.pictures)) for job in live]
            if text != now or state != shown:
                yield text, gr.skip() if state == shown else self._cards(length, words)
                now, shown = text, state
            if not live or jobs.is_stopping:
                return
            await asyncio.sleep(_REFRESH)

    def _cards(self, length: int, words: Words) -> str:
        return parts.history(self._jobs.store.latest(length), self._jobs, words)

    async def show_more(self, length: int, request: gr.Request) -> tuple[int, str]:
        return length + _PAGE, self._cards(length + _PAGE, _words(request))

    async def begin(self, event: gr.EventData) -> tuple[Any, ...]:
        """A picture was chosen: the form takes its size."""
        size = [event._data.get(name) for name in ("width", "height")]
        try:
            width, height = map(int, size)
            check_pixels("the picture", width, height, MOST_PIXELS)
        except (ZImageError, TypeError, ValueError) as fault:
            return False, parts.line(str(fault), "z-bad"), gr.skip(), gr.skip()
        multiple, most = self._engine.config.pixel_multiple, self._most
        scale = min(1.0, most / max(width, height))
        fitted = [max(multiple, int(n * scale) // multiple * multiple) for n in (width, height)]
        return True, "", *fitted

    async def reset(self) -> tuple[Any, ...]:
        return "", {}, *(self._first[name] for name in form.FIELDS)

    async def refill(self, request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        """One of our pictures was dropped: the form takes its settings."""
        try:
            data = from_base64("the picture", str(event._data.get("file")))
            metadata = await self._jobs.aside(metadata_in, data, "the picture", MOST_PIXELS)
        except ZImageError as fault:
            return parts.line(str(fault), "z-bad"), *[gr.skip()] * (1 + len(form.FIELDS))
        return self._filled(
            form.of_metadata(metadata, self._first), _words(request), bool(metadata.get("image"))
        )

    def _filled(self, found: dict[str, Any], words: Words, had_picture: bool) -> tuple[Any, ...]:
        rest = found["rest"]
        told = parts.line(words["original_gone"], "z-warn") if had_picture else ""
        if rest:
            kept = ", ".join(f"{name} {value}" for name, value in rest.items())
            told += parts.line(f"{words['kept']}: {kept}")
        return told, rest, *(found[name] for name in form.FIELDS)

    async def act(self, request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        """A button of a job or of a picture was pressed."""
        words, data = _words(request), event._data
        nothing = [gr.skip()] * (1 + len(form.FIELDS))
        try:
            found = await self._act(str(data.get("act")), str(data.get("job")), data.get("picture"))
        except (ZImageError, RefusedError) as fault:
            return parts.line(str(fault), "z-bad"), *nothing, gr.skip()
        if found is None:
            return "", *nothing, self._cards(_PAGE, words)
        record, seed = found
        filled = form.of_job(record.arguments, seed, self._first)
        return *self._filled(filled, words, bool(record.inputs)), gr.skip()

    async def _act(self, act: str, job: str, picture: Any) -> tuple[Any, int] | None:
        """Returns what the form is to be filled with. Raises RefusedError."""
        jobs = self._jobs
        if act == "cancel":
            if job in jobs.live:
                await jobs.cancel(jobs.live[job])
            return None
        record = jobs.store.find(job)
        if record is None or record.state == ACCEPTED:
            raise RefusedError(404, "no such job", "not_found")
        if act == "remove":
            await asyncio.wrap_future(jobs.store.remove(job))
            return None
        number = next((n for n in record.pictures if str(n) == str(picture)), None)
        if number is None:
            raise RefusedError(404, "no such picture", "not_found")
        if act == "again":
            return record, record.seeds[number]
        jobs.check_intake()
        await jobs.accept(await jobs.aside(self._enlarged, record, number))
        return None

    def _enlarged(self, record: Any, number: int) -> Order:
        left_out = ("width", "height", "region", "strength", "strength_rule", *form.OF_PICTURE)
        given = {k: v for k, v in record.arguments.items() if k not in left_out}
        data = self._jobs.store.picture(record.id, number).read_bytes()
        return order(
            self._engine.config,
            self._jobs.loras,
            "page",
            given,
            seed=record.seeds[number],
            inputs={"image": data},
            enlarge=_FACTOR,
        )


def presets(side: int, multiple: int, most: int) -> list[tuple[str, tuple[int, int]]]:
    """Names and sizes: three squares up to the model's own side, and two ratios of its area, each
    side at most `most`."""
    squares = [n // multiple * multiple for n in (side // 2, side * 3 // 4, side)]
    found = [(str(n), (n, n)) for n in squares]
    for ratio in ("16:9", "9:16"):
        area = side
        while max(size := parse_size(ratio, area, multiple)) > most:
            area -= multiple
        found.append((ratio, size))
    return found


def _pictures(chosen: str) -> dict[str, bytes]:
    """The files that the browser sent. Raises UsageError."""
    if not chosen:
        return {}
    try:
        found = json.loads(chosen)
        return {n: from_base64(n, found[n]) for n in ("image", "mask") if n in found}
    except (ValueError, TypeError, AttributeError):
        raise UsageError("the picture cannot be read") from None
