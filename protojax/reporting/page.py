"""The HTML page: its look, and the few pieces that every report is made of.

Every piece takes plain text and escapes it; `Html` marks what is already markup. The page needs no network, no script
and no font file, and its content policy forbids the browser to fetch anything.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Markup that is ready to be written; everything else is escaped."""


def text(value: object) -> Html:
    """Escape a value unless it is markup already."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[object], between: str = "\n") -> Html:
    return Html(between.join(text(part) for part in parts))


def tag(name: str, content: object = "", classes: str = "") -> Html:
    """<name class=classes>content</name>."""
    attribute = f' class="{html.escape(classes)}"' if classes else ""
    return Html(f"<{name}{attribute}>{text(content)}</{name}>")


def section(title: str, *parts: object, anchor: str = "") -> Html:
    identity = f' id="{html.escape(anchor)}"' if anchor else ""
    return Html(f"<section{identity}><h2>{text(title)}</h2>\n{join(parts)}\n</section>")


def details(title: str, *parts: object) -> Html:
    return Html(f"<details><summary>{text(title)}</summary>\n{join(parts)}\n</details>")


def code(command: str, classes: str = "") -> Html:
    """Preformatted text; class `listing` scrolls where others wrap."""
    return tag("pre", tag("code", command), classes)


def table(headers: Sequence[object], rows: Iterable[Sequence[object]], strong: Iterable[int] = ()) -> Html:
    """A table that scrolls inside itself on a narrow screen. The first column is the row's name; strong: numbers of
    the rows that are set off."""
    marked = set(strong)
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in headers)
    body = []
    for number, row in enumerate(rows):
        first, *rest = row
        cells = f'<th scope="row">{text(first)}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in rest)
        body.append(f'<tr class="strong">{cells}</tr>' if number in marked else f"<tr>{cells}</tr>")
    inside = f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table>"
    return Html(f'<div class="scroll" tabindex="0">{inside}</div>')


def plot(title: str, drawing: str | None, caption: object, reason: str = "") -> Html:
    """One figure; drawing None: its place says why it is absent."""
    if drawing is None:
        return Html(f'<figure class="absent"><h3>{text(title)}</h3><p>Not shown: {text(reason)}</p></figure>')
    below = tag("figcaption", caption) if caption else ""
    return Html(f"<figure><h3>{text(title)}</h3>{drawing}{below}</figure>")


def grid(*figures: Html) -> Html:
    return Html('<div class="grid">' + "\n".join(figures) + "</div>")


STATUS_MARKS = {"good": "✓", "warn": "!", "bad": "✕", "unknown": "?"}


def card(question: str, status: str, answer: str, sentences: Iterable[object]) -> Html:
    """A question with its answer in a word, a mark that does not rely on colour, and sentences."""
    mark = f'<span class="mark" aria-hidden="true">{STATUS_MARKS[status]}</span>'
    body = "".join(f"<p>{text(sentence)}</p>" for sentence in sentences)
    return Html(
        f'<div class="card {status}"><h3>{text(question)}</h3>'
        f'<p class="answer">{mark} <strong>{text(answer)}</strong></p>{body}</div>'
    )


def image(data: bytes, mime: str, description: str) -> Html:
    encoded = base64.b64encode(data).decode("ascii")
    return Html(f'<img src="data:{html.escape(mime)};base64,{encoded}" alt="{html.escape(description)}">')


def page(title: str, *parts: object) -> str:
    """The whole document."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{join(parts)}
</main>
</body>
</html>
"""


CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --surface: #ffffff; --ink: #1c1c1a; --muted: #5d5d58; --grid: #e4e4df; --line: #dcdcd6;
  --link: #1f5fae; --good: #11703a; --warn: #8a5a00; --bad: #b3261e; --unknown: #5d5d58;
  --s1: #2a78d6; --s2: #d9622b; --s3: #16876a; --s4: #8a5cc9; --s5: #b98300; --s6: #c9447d;
  --s7: #4d7d1c; --s8: #57606a;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131312; --surface: #1d1d1b; --ink: #ecece6; --muted: #a9a9a1; --grid: #333330; --line: #383834;
    --link: #86b6ef; --good: #5cc98a; --warn: #e5b34b; --bad: #f2867d; --unknown: #a9a9a1;
    --s1: #5b9df0; --s2: #ef8554; --s3: #3dbb98; --s4: #b391ee; --s5: #dba92f; --s6: #ec7fac;
    --s7: #8fbf55; --s8: #9aa4ae;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 var(--sans); }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
header { margin-bottom: 20px; }
h1 { font-size: 1.65rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 40px 0 12px; }
h3 { font-size: 1rem; line-height: 1.35; margin: 0 0 8px; }
p { margin: 0 0 10px; max-width: 72ch; overflow-wrap: anywhere; }
ul, ol { margin: 0 0 10px; padding-left: 1.3em; } li { margin-bottom: 8px; overflow-wrap: anywhere; }
.sub, figcaption, .note { color: var(--muted); font-size: 0.9rem; }
.grid, .cards { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
figure, .card, .absent, details, .finding {
  margin: 0; padding: 14px 16px; background: var(--surface); border: 1px solid var(--line); border-radius: 8px;
  min-width: 0;
}
figure svg { display: block; width: 100%; height: auto; font-family: var(--sans); overflow: visible; }
figure svg image { image-rendering: pixelated; }
figcaption { margin-top: 8px; line-height: 1.4; }
.absent { border-style: dashed; color: var(--muted); } .absent p { margin: 0; }
.card { border-left: 4px solid var(--unknown); } .card p:last-child { margin-bottom: 0; }
.card.good { border-left-color: var(--good); } .card.warn { border-left-color: var(--warn); }
.card.bad { border-left-color: var(--bad); }
.answer { font-size: 1.1rem; margin-bottom: 8px; }
.mark {
  display: inline-block; width: 1.45em; height: 1.45em; line-height: 1.45em; text-align: center; border-radius: 50%;
  font-weight: 700; font-size: 0.85em; color: var(--surface); background: var(--unknown); margin-right: 4px;
}
.good .mark { background: var(--good); } .warn .mark { background: var(--warn); } .bad .mark { background: var(--bad); }
.finding { margin-bottom: 10px; } .finding p:last-child { margin-bottom: 0; }
.severity { font-weight: 700; } .error .severity { color: var(--bad); } .warning .severity { color: var(--warn); }
.notice .severity { color: var(--muted); }
.scroll {
  overflow-x: auto; margin-bottom: 12px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--surface);
}
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; white-space: normal; min-width: 7.5em; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 400; } tbody tr:last-child > * { border-bottom: 0; }
tr.strong > * { font-weight: 700; background: color-mix(in srgb, var(--grid) 45%, transparent); }
.plain thead th { text-align: left; } .plain td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
pre {
  margin: 4px 0 12px; padding: 10px 12px; background: var(--page); border: 1px solid var(--line); border-radius: 6px;
  overflow-x: auto; font: 0.86rem/1.45 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere;
}
pre.listing { white-space: pre; }
li pre { max-width: none; }
code { font-family: var(--mono); font-size: 0.95em; }
details { margin-bottom: 12px; } summary { cursor: pointer; font-weight: 600; }
details[open] summary { margin-bottom: 10px; }
details .scroll { border-radius: 6px; }
.samples { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.strip { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 3px; max-width: 420px; }
.strip img { display: block; width: 100%; height: auto; border-radius: 3px; }
@media (max-width: 520px) {
  main { padding: 16px 12px 48px; } body { font-size: 15px; }
  figure, .card, details, .finding { padding: 12px; } th, td { padding: 6px 8px; } table { font-size: 0.86rem; }
}
"""
