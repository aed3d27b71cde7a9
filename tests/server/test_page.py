"""The page, as a browser shows it. The tests that drive Chromium are skipped without one."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.server.conftest import png
from zimage_jax.pipeline.picture import texts_in
from zimage_jax.server.page import form, parts
from zimage_jax.server.page.words import LANGUAGES, words_for

KEY = "a key of some length"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def server(start, lora_folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("page") / "data"
    with start(data, "--page", "--loras", lora_folder, ZIMAGE_API_KEY=KEY) as made:
        yield made


def test_languages_have_the_same_words():
    assert LANGUAGES["en"].keys() == LANGUAGES["zh"].keys()
    assert words_for("zh-CN,zh;q=0.9") is LANGUAGES["zh"]
    assert words_for("") is words_for("fr") is LANGUAGES["en"]


@pytest.mark.exhaustive
def test_gradio_is_asked_for_nothing_but_the_page(server):
    status, headers, body = server.ask("GET", "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert b"zimage.memory" in body
    assert b"://fonts." not in body
    paths = (
        *("upload", "file=/etc/passwd", "file=pyproject.toml", "proxy=http://127.0.0.1/"),
        *("component_server", "call/draw", "run/draw", "vibe-code", "run-history/records"),
        *("stream/a/0/0/playlist.m3u8", "queue/status", "../jobs", "file/a"),
    )
    for path in paths:
        for method in ("GET", "POST"):
            status = server.ask(method, f"/gradio_api/{path}")[0]
            assert status in (404, 405), (method, path)
    assert server.ask("POST", "/login")[0] in (404, 405)
    assert server.ask("GET", "/monitoring")[0] == 404


def test_a_browser_without_the_key_is_asked_for_it(server):
    key, server.key = server.key, None
    try:
        status, _, body = server.ask("GET", "/")
        assert status == 401
        assert b"/sign-in" in body
        assert server.ask("GET", "/config")[0] == 401
    finally:
        server.key = key


def test_what_clients_wrote_is_escaped():
    evil = '"><script>alert(1)</script>'
    drawn = {
        **{"number": 0, "url": "/pictures/a-0.png", "seed": 1, "width": 8, "height": 8, "steps": 1},
        **{"guidance": 0.0, "seconds": 1.0, "peak_device_bytes": 1, "schedule": "ring"},
    }
    found = {"id": "a", "number": 1, "arguments": {"prompt": evil}, "warnings": [evil]}
    for text in (parts._card(found, drawn, LANGUAGES["en"]), parts.line(evil)):
        assert "<script>" not in text
        assert "&lt;script&gt;" in text


def test_a_form_becomes_the_job_that_filled_it(server):
    from zimage_jax.model.config import TURBO
    from zimage_jax.planning.plan import Memory

    memory = Memory(max_vram_bytes=2**33, pins=((0, "resident"),))
    first = form.defaults(TURBO, memory)
    given = {
        **{"prompt": "a", "negative_prompt": "b", "width": 512, "height": 768, "steps": 5},
        **{"guidance": 2.0, "sampler": "heun", "sigmas": "karras", "kv": {"reuse": 2}},
        "memory": {"max_vram_bytes": 2**33, "low_vram": True, "pins": [[0, "resident"]]},
        "lora": [{"name": "ink", "weight": 0.5}, {"name": "b", "weight": 0.5}],
    }
    filled = form.of_job(given, 2**60, first)
    rest = filled.pop("rest")
    assert rest == {"sigmas": "karras", "kv": {"reuse": 2}}
    assert filled["seed"] == str(2**60)
    assert rest | form.arguments(filled, memory, has_picture=False) == given
    # one weight for all is what the form has a field for
    for lora in ([{"name": "a", "weight": 5.0}], [{"name": "a"}, {"name": "b", "weight": 0.5}]):
        filled = form.of_job(given | {"lora": lora}, 1, first)
        assert (filled["loras"], filled["rest"]["lora"]) == ([], lora)
    drawn = {"seed": 1, "lora": [{"name": "ink.safetensors", "weight": 0.5, "sha256": "0"}]}
    filled = form.of_metadata(drawn, first)
    assert (filled["loras"], filled["lora_weight"]) == (["ink"], 0.5)
    # untouched switches say nothing about memory
    untouched = form.arguments(first | {"prompt": "a"}, memory, has_picture=False)
    assert "memory" not in untouched
    switched = form.arguments(
        first | {"text_encoder": True, "chunks": 8.0}, memory, has_picture=True
    )
    assert switched["memory"]["text_encoder"] == "staged"
    assert switched["memory"]["chunks"] == 8


# -- in Chromium -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        path = CHROMIUM or playwright.chromium.executable_path
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except api.Error as fault:
            pytest.skip(f"the page's tests need Chromium: {str(fault).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, server):
    """Opens the page, signed in; fails for any error that the browser reports."""
    contexts, errors = [], []

    def call(locale="en-US", **options):
        context = chromium.new_context(locale=locale, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.fill("input[name=key]", KEY)
        page.click("button")
        page.wait_for_selector("#z-prompt textarea")
        page.wait_for_selector("#z-plan .z-good")
        return page

    yield call
    for context in contexts:
        context.close()
    assert errors == []


def draw(page, prompt: str) -> None:
    """Draw with the form, and wait for a card."""
    page.fill("#z-prompt textarea", prompt)
    page.click("#z-draw")
    page.wait_for_selector(f".z-card:has-text('{prompt}') img, #z-told .z-bad, .toast-body")
    assert page.locator("#z-told .z-bad, .toast-body").all_inner_texts() == []


def set_number(page, locale: str, name: str, value: int) -> None:
    box = page.locator(f"input[type=number][aria-label*='{LANGUAGES[locale[:2]][name]}']")
    box.fill(str(value))
    box.press("Enter")


def saved(page, tmp_path) -> dict:
    """The metadata of the newest picture, saved by its link."""
    with page.expect_download() as found:
        page.locator(".z-save").first.click()
    path = tmp_path / found.value.suggested_filename
    found.value.save_as(path)
    return json.loads(texts_in(path.read_bytes())["zimage_jax"]) | {"path": path}


@pytest.mark.parametrize(
    ("locale", "prompt", "word"),
    [
        pytest.param("en-US", "a red circle", "Draw", marks=pytest.mark.exhaustive),
        pytest.param("zh-CN", "红色圆形", "生成", marks=pytest.mark.long),
    ],
)
def test_a_prompt_becomes_a_saved_png_whose_settings_refill_the_form(
    visit, tmp_path, locale, prompt, word
):
    page = visit(locale)
    assert page.inner_text("#z-draw") == word
    page.get_by_role("button", name="9:16", exact=True).click()
    page.wait_for_function(
        'document.querySelector(\'input[aria-label*="Height"], input[aria-label*="高度"]\').value > 600'
    )
    set_number(page, locale, "width", 48)
    set_number(page, locale, "height", 64)
    draw(page, prompt)
    page.wait_for_selector("#z-now .z-run", state="detached")
    metadata = saved(page, tmp_path)
    assert (metadata["prompt"], metadata["width"], metadata["height"]) == (prompt, 48, 64)
    # what is on the device, asked once a second: kilobytes, which have no width
    page.wait_for_selector(".z-strip div", state="attached")

    page.reload()
    page.wait_for_selector(".z-card")
    page.get_by_text(LANGUAGES[locale[:2]]["settings"], exact=True).click()
    page.set_input_files("input[accept='image/png']", metadata["path"])
    seed = page.get_by_label(LANGUAGES[locale[:2]]["seed"], exact=False).first
    page.wait_for_function(
        "seed => [...document.querySelectorAll('input,textarea')].some(e => e.value === seed)",
        arg=str(metadata["seed"]),
    )
    assert page.input_value("#z-prompt textarea") == prompt
    assert seed is not None
    draw(page, prompt)
    page.wait_for_function("document.querySelectorAll('.z-card').length > 1")
    page.wait_for_selector("#z-now .z-run", state="detached")
    again = saved(page, tmp_path)
    assert np.array_equal(
        *(np.asarray(Image.open(io.BytesIO(m["path"].read_bytes()))) for m in (metadata, again))
    )


@pytest.mark.long
def test_a_lora_is_chosen_and_comes_back_with_its_picture(visit, server):
    page = visit()
    for name in ("width", "height"):
        set_number(page, "en", name, 64)
    page.get_by_text("LoRA", exact=True).click()
    page.click("#z-loras input")
    page.get_by_role("option", name="ink (drawn in ink)").click()
    set_number(page, "en", "lora_weight", 0.5)
    draw(page, "a fox in ink")
    page.wait_for_selector("#z-now .z-run", state="detached")
    job = server.get("/jobs?limit=1")["jobs"][0]
    assert job["arguments"]["lora"] == [{"name": "ink", "weight": 0.5}]
    page.reload()
    page.wait_for_selector(".z-card")
    page.locator("button[data-act=again]").first.click()
    page.wait_for_function("document.querySelector('#z-prompt textarea').value !== ''")
    draw(page, "a fox again")
    page.wait_for_selector("#z-now .z-run", state="detached")
    again = server.get("/jobs?limit=1")["jobs"][0]
    assert again["arguments"]["lora"] == job["arguments"]["lora"]
    digests = {of["pictures"][0]["latents_sha256"] for of in (job, again)}
    assert len(digests) == 2  # another prompt


@pytest.mark.long  # on a machine that is busy it may miss the seconds in which the job runs
def test_a_job_is_cancelled_and_found_again_after_a_reload(visit, server):
    page = visit()
    for name, value in {"width": 256, "height": 256, "steps": 50, "count": 4}.items():
        set_number(page, "en", name, value)
    page.fill("#z-prompt textarea", "one that takes long")
    page.click("#z-draw")
    page.wait_for_selector(
        ".z-run[data-state=running] .z-previews img, #z-told .z-bad, .toast-body"
    )
    assert page.locator("#z-told .z-bad, .toast-body").all_inner_texts() == []
    page.reload()
    page.wait_for_selector(".z-run")
    page.click(".z-run button[data-act=cancel]")
    page.wait_for_selector("#z-now .z-run", state="detached")
    assert server.get("/jobs?limit=1")["jobs"][0]["state"] == "cancelled"


@pytest.mark.long
def test_pictures_from_pictures_on_a_phone(visit, server, tmp_path):
    page = visit("en-US", viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    path = tmp_path / "in.png"
    path.write_bytes(png(np.full((96, 64, 3), 40, np.uint8)))
    page.get_by_text("Begin from a picture").click()
    page.set_input_files(".z-drop input[accept='image/*']", path)
    page.wait_for_selector(".z-stage canvas", state="visible")
    page.wait_for_function("document.querySelector('.z-stage canvas').width === 64")
    box = page.locator(".z-stage canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2 + 20, steps=4)
    page.mouse.up()
    draw(page, "a masked star")
    job = server.get("/jobs?limit=1")["jobs"][0]
    assert set(job["from"]) == {"image", "mask"}
    assert (job["arguments"]["width"], job["arguments"]["height"]) == (64, 96)
    page.wait_for_selector("#z-now .z-run", state="detached")
    page.locator("button[data-act=enlarge]").first.click()
    page.wait_for_selector(".z-card img[width='128']")
    job = server.get("/jobs?limit=1")["jobs"][0]
    assert (job["pictures"][0]["width"], job["pictures"][0]["height"]) == (128, 192)
    assert job["arguments"]["strength"] == 0.5
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
