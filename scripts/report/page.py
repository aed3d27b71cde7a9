"""HTML of a report: headings, tables and figures in one file that asks nothing of a network."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { background: var(--soft); }
figure { margin: 1rem 0; } figure img { width: 100%; min-width: 34rem; background: #fff; border-radius: 4px; }
figcaption { font-size: .85rem; opacity: .8; }
.predicted { border-left: 4px solid #c80; padding-left: .8rem; }
@media print {
  :root { color-scheme: light; } body { font-size: 10pt; max-width: none; padding: 0; }
  .wide { overflow: visible; } figure, table { break-inside: avoid; } figure img { min-width: 0; }
  th, td { padding: .1rem .3rem; font-size: 8pt; }
}
"""


def text(*sentences: str) -> str:
    return f"<p>{html.escape(' '.join(sentences))}</p>"


def table(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """The first column to the left, the others to the right; None is a dash."""

    def cells(values: Sequence, tag: str) -> str:
        words = ("–" if value is None else html.escape(str(value)) for value in values)
        return "<tr>" + "".join(f"<{tag}>{word}</{tag}>" for word in words) + "</tr>"

    body = "".join(cells(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{cells(columns, "th")}</thead><tbody>{body}</tbody></table></div>'


def figure(file: Path, caption: str) -> str:
    kind = {".svg": "svg+xml", ".png": "png"}[file.suffix]
    data = base64.b64encode(file.read_bytes()).decode()
    image = f'<img alt="{html.escape(caption)}" src="data:image/{kind};base64,{data}">'
    return f'<figure><div class="wide">{image}</div><figcaption>{html.escape(caption)}</figcaption></figure>'


def section(title: str, *parts: str, predicted: bool = False) -> str:
    """`predicted`: marked as what nobody measured. A section without parts is left out."""
    if not any(parts):
        return ""
    kind = ' class="predicted"' if predicted else ""
    return f"<section{kind}><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def page(title: str, *parts: str) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
    body = f"<h1>{html.escape(title)}</h1>{''.join(parts)}"
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n'
