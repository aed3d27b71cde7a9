"""Parts of the page as HTML. What clients wrote is escaped."""

import base64
import html
from collections.abc import Iterable, Mapping
from typing import Any

from ...units import size
from ..jobs import RUNNING, Jobs, Live
from ..native import view
from ..store import CANCELLED, FAILED, Record
from .words import Words


def line(text: str, kind: str = "") -> str:
    return f'<p class="z-line {kind}">{html.escape(text)}</p>' if text else ""


def lora(row: Mapping[str, Any]) -> str:
    """A LoRA's name, and what it was trained to hear: text, not HTML."""
    words = ", ".join(row["trigger_words"][:3])
    return f"{row['name']} ({words})" if words else row["name"]


def plan(found: Mapping[str, Any], words: Words) -> str:
    """What a job would take, as `estimate` says it."""
    largest = found["largest"]
    room = f"{words['largest']}: {largest['width']}x{largest['height']}" if largest else ""
    if not found["fits"]:
        needs = f"{words['too_large']}: {words['needs']} {size(found['needed_bytes'])}"
        return line(f"{needs}; {room or words['none_fits']}", "z-bad")
    parts = [
        f"{words['peak']} {size(found['peak_bytes'])} {words['of']} {size(found['budget_bytes'])}"
    ]
    if found["seconds"] is not None:
        parts.append(f"{words['predicted']} {found['seconds']:.2g} {words['seconds']}")
    parts += [str(found["schedule"]), words["fits"], room]
    return line(" · ".join(filter(None, parts)), "z-good")


def running(live: Iterable[Live], jobs: Jobs, words: Words) -> str:
    """The jobs that have not ended: place in the queue or bar, previews, a button that cancels."""
    return "".join(_running(job, jobs, words) for job in live)


def _running(live: Live, jobs: Jobs, words: Words) -> str:
    prompt = html.escape(live.record.arguments["prompt"])
    if live.state == RUNNING:
        percent = round(100 * live.progress)
        state = f'<div class="z-bar"><div style="width:{percent}%"></div><b>{percent} %</b></div>'
        previews = "".join(
            f'<img alt="" src="data:image/png;base64,{base64.b64encode(live.preview(n)).decode()}">'
            for n in sorted(live.steps)
            if n not in live.pictures
        )
    else:
        state, previews = line(f"{words['place']} {jobs.position(live)}"), ""
    button = f'<button data-act="cancel" data-job="{live.id}">{words["cancel"]}</button>'
    warnings = "".join(line(text, "z-warn") for text in live.warnings)
    return (
        f'<div class="z-run" data-state="{live.state}"><p class="z-prompt">{prompt}</p>{state}'
        f'<div class="z-previews">{previews}</div>{warnings}{button}</div>'
    )


def history(records: Iterable[Record], jobs: Jobs, words: Words) -> str:
    """Jobs with their pictures, the newest first."""
    cards = "".join(_job(record, jobs, words) for record in records)
    return f'<div class="z-cards">{cards}</div>' if cards else line(words["empty"])


def _job(record: Record, jobs: Jobs, words: Words) -> str:
    found = view(jobs, record)
    pictures = "".join(_card(found, drawn, words) for drawn in found["pictures"])
    if pictures or record.state not in (FAILED, CANCELLED):
        return pictures
    reason = f"{words[record.state]}: {record.error}" if record.error else words[record.state]
    return (
        f'<figure class="z-card z-ended"><p class="z-prompt">'
        f"{html.escape(record.arguments['prompt'])}</p>{line(reason, 'z-bad')}"
        f"{_button('remove', record.id, 0, words)}</figure>"
    )


def _card(found: Mapping[str, Any], drawn: Mapping[str, Any], words: Words) -> str:
    job, number = found["id"], drawn["number"]
    prompt = html.escape(found["arguments"]["prompt"])
    facts = (
        f"{words['seed']} {drawn['seed']}",
        f"{drawn['width']}x{drawn['height']}",
        f"{words['steps']} {drawn['steps']}",
        f"{words['guidance']} {drawn['guidance']:g}",
        f"{words['done_at']} {drawn['seconds']:.1f} {words['seconds']}",
        f"{words['peak']} {size(drawn['peak_device_bytes'])} ({drawn['schedule']})",
    )
    caption = html.escape(" · ".join(facts))
    warnings = "".join(line(text, "z-warn") for text in found["warnings"])
    buttons = "".join(_button(act, job, number, words) for act in ("enlarge", "again", "remove"))
    return (
        f'<figure class="z-card" id="z-{job}-{number}"><a href="{drawn["url"]}" target="_blank">'
        f'<img loading="lazy" src="{drawn["url"]}" alt="{prompt}" width="{drawn["width"]}" '
        f'height="{drawn["height"]}"></a><figcaption><p class="z-prompt">{prompt}</p>'
        f"<p>{caption}</p>{warnings}<div>"
        f'<a class="z-save" href="{drawn["url"]}" download="zimage-{found["number"]}-'
        f'{drawn["seed"]}.png">{words["save"]}</a>{buttons}</div></figcaption></figure>'
    )


def _button(act: str, job: str, number: int, words: Words) -> str:
    return (
        f'<button data-act="{act}" data-job="{job}" data-picture="{number}">{words[act]}</button>'
    )
