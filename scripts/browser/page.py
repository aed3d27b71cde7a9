"""Pictures of the server's page, drawn with by the tiny model in Chromium (playwright).

python -m scripts.browser.page scripts/results/page
"""

import io
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import click
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from scripts.bench.live_server import LiveServer

_COLOURS = 128  # of a stored picture: a fifth of the bytes


@contextmanager
def visit(browser, url: str, locale: str, width: int, height: int):
    phone = {"is_mobile": True, "has_touch": True} if width < 600 else {}
    context = browser.new_context(
        locale=locale, viewport={"width": width, "height": height}, **phone
    )
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#z-plan .z-good")
    yield page
    context.close()


def draw(page: Page, prompt: str) -> None:
    before = page.locator(".z-card img").count()
    page.fill("#z-prompt textarea", prompt)
    page.click("#z-draw")
    page.wait_for_function("n => document.querySelectorAll('.z-card img').length > n", arg=before)
    page.wait_for_selector("#z-now .z-run", state="detached")


def save(page: Page, path: Path, *, whole: bool = True) -> None:
    page.wait_for_timeout(1500)  # the strip of memory is a second old
    image = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
    image.quantize(_COLOURS).save(path, optimize=True)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
def main(out: Path) -> None:
    """Write desktop.png, running.png and phone.png to OUT."""
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        LiveServer(Path(folder) / "data") as server,
        sync_playwright() as playwright,
    ):
        path = shutil.which("chromium") or playwright.chromium.executable_path
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        with visit(browser, server.url, "en-US", 1280, 1000) as page:
            for prompt in ("a red circle", "a blue star above a green square", "a yellow triangle"):
                draw(page, prompt)
            save(page, out / "desktop.png")
            page.locator("input[type=number]").nth(3).fill("50")
            page.locator("input[type=number]").nth(3).press("Enter")
            page.locator("input[type=number]").nth(2).fill("4")
            page.locator("input[type=number]").nth(2).press("Enter")
            page.fill("#z-prompt textarea", "a purple square")
            page.click("#z-draw")
            page.wait_for_function("document.querySelectorAll('.z-previews img').length == 4")
            page.wait_for_timeout(1200)
            save(page, out / "running.png", whole=False)
        with visit(browser, server.url, "zh-CN", 390, 844) as page:
            page.wait_for_selector("#z-now .z-run", state="detached")
            draw(page, "红色圆形")
            save(page, out / "phone.png")
        browser.close()


if __name__ == "__main__":
    main()
