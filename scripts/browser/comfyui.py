"""A picture of an example workflow in ComfyUI's own page, drawn there.

python -m scripts.browser.comfyui http://127.0.0.1:8188 scripts/results/comfyui/workflow.png
"""

import argparse
import json
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from zimage_jax.comfyui.__main__ import NODES

WORKFLOW = NODES / "example_workflows" / "zimage_turbo_workflow.json"
PATIENCE = 300_000  # milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="of a ComfyUI that has the nodes")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--workflow", type=Path, default=WORKFLOW)
    arguments = parser.parse_args()
    graph = json.loads(arguments.workflow.read_text("utf-8"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.goto(arguments.address)
        page.wait_for_function("() => window.app?.graph != null && window.app.vueAppReady")
        page.evaluate("async graph => { await window.app.loadGraphData(graph) }", graph)
        # one after the other: the queue tells when it is empty again
        page.evaluate("async () => { await window.app.queuePrompt(0) }")
        page.wait_for_function(
            "async () => { const q = await (await fetch('/queue')).json();"
            " return !q.queue_running.length && !q.queue_pending.length }",
            polling=1000,
        )
        page.keyboard.press("Escape")
        page.evaluate(
            "() => { const c = window.app.canvas; c.ds.reset(); c.fitViewToSelectionAnimated?.() }"
        )
        page.keyboard.press(".")  # fit the view
        page.wait_for_timeout(3000)
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=arguments.picture)
        browser.close()


if __name__ == "__main__":
    main()
