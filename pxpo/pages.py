"""Reports: blocks that are written as Markdown, and as a page that needs nothing from outside.

The page is one file of HTML, in light and in dark; what a person worded is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


class Block(Protocol):
    """What a page is made of."""

    def html(self) -> str: ...


class Words(Block, Protocol):
    """What can be written as Markdown too."""

    def markdown(self) -> str: ...


@dataclass(frozen=True)
class Heading:
    text: str

    def markdown(self) -> str:
        return f"## {self.text}"

    def html(self) -> str:
        return f"<h2>{inline(self.text)}</h2>"


@dataclass(frozen=True)
class Text:
    """A paragraph; what stands in `backticks` is code. note: set apart from the others."""

    text: str
    note: bool = False

    def markdown(self) -> str:
        return f"> {self.text}" if self.note else self.text

    def html(self) -> str:
        return f"<p{' class=note' * self.note}>{inline(self.text)}</p>"


@dataclass(frozen=True)
class Points:
    """A list."""

    items: Sequence[str]

    def markdown(self) -> str:
        return "\n".join(f"- {item}" for item in self.items)

    def html(self) -> str:
        return "<ul>" + "".join(f"<li>{inline(item)}</li>" for item in self.items) + "</ul>"


@dataclass(frozen=True)
class Table:
    """Rows of texts under the names of the columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def html(self) -> str:
        head = "".join(f"<th scope=col>{inline(name)}</th>" for name in self.columns)
        rows = [
            f"<tr><th scope=row>{inline(row[0])}</th>"
            + "".join(f"<td>{inline(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        ]
        return f"<div class=wide><table><tr>{head}</tr>{''.join(rows)}</table></div>"


@dataclass(frozen=True)
class Figure:
    """A picture in a file, by its name from the page's folder. width, height: in pixels."""

    file: str
    caption: str
    width: int
    height: int

    def markdown(self) -> str:
        return f"![{self.caption}]({self.file})\n\n*{self.caption}*"

    def html(self) -> str:
        words = inline(self.caption)
        alt = html.escape(self.caption)
        return (
            f'<figure><div class=wide><img src="{html.escape(self.file)}" alt="{alt}" '
            f"width={self.width} height={self.height}></div><figcaption>{words}</figcaption>"
            "</figure>"
        )


@dataclass(frozen=True)
class Numbers:
    """The few numbers that matter most: (number, what it is)."""

    items: Sequence[tuple[str, str]]

    def html(self) -> str:
        cells = "".join(
            f"<div><dd>{inline(number)}</dd><dt>{inline(words)}</dt></div>"
            for number, words in self.items
        )
        return f"<dl>{cells}</dl>"


@dataclass(frozen=True)
class Pairs:
    """Pictures before and after, side by side, inside the page itself: (before, after, words)."""

    items: Sequence[tuple[Image.Image, Image.Image, str]]

    def html(self) -> str:
        cells = [
            f"<figure><div>{_embedded(before, f'before, {words}')}"
            f"{_embedded(after, f'after, {words}')}</div>"
            f"<figcaption>{inline(words)}</figcaption></figure>"
            for before, after, words in self.items
        ]
        return f"<div class=pairs>{''.join(cells)}</div>"


def _embedded(picture: Image.Image, alt: str) -> str:
    written = io.BytesIO()
    picture.convert("RGB").save(written, "JPEG", quality=90)
    data = base64.b64encode(written.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(alt)}" '
        f"width={picture.width} height={picture.height}>"
    )


def inline(text: str) -> str:
    """Escaped, with what stands in `backticks` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def plain(text: str) -> str:
    """What a person worded as Markdown, in one line, that shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>#|$~&])", r"\\\1", _line(text))


def code(text: str) -> str:
    """The same, as code; for a table's cell as well, which a bar would end."""
    text = _line(text).replace("|", "\\|")
    if "`" not in text:
        return f"`{text}`"
    marks = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{marks} {text} {marks}"


def _line(text: str) -> str:
    """In one line, without what controls terminals and nobody sees."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", " ".join(text.split()))


def as_markdown(title: str, blocks: Sequence[Words]) -> str:
    return "\n\n".join([f"# {title}", *(block.markdown() for block in blocks)]) + "\n"


def as_page(title: str, blocks: Sequence[Block]) -> str:
    body = "\n".join(block.html() for block in blocks)
    words = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{words}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{words}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


STYLE = """
:root {color-scheme: light dark; --ink: #1d222b; --soft: #5b6472; --ground: #fbfbf9;
  --card: #ffffff; --line: #e3e5e1; --accent: #137a42}
@media (prefers-color-scheme: dark) {
  :root {--ink: #e8eaed; --soft: #a2abb8; --ground: #14171b; --card: #1c2026; --line: #313740;
    --accent: #5fd08f}
}
* {box-sizing: border-box}
body {margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif}
main {max-width: 1040px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem}
h1 {font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.2; margin: 0 0 1rem; text-wrap: balance}
h2 {font-size: 1.3rem; margin: 3rem 0 0.8rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line)}
p, li {max-width: 46rem}
.note {border-left: 4px solid var(--accent); background: var(--card); padding: 0.7rem 1rem}
code {font: 0.88em ui-monospace, Menlo, Consolas, monospace; background: var(--card);
  border: 1px solid var(--line); border-radius: 4px; padding: 0.05em 0.3em; overflow-wrap: anywhere}
dl {display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 0.8rem;
  margin: 1.5rem 0}
dl div {background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.8rem 1rem; display: flex; flex-direction: column}
dd {margin: 0; font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums}
dt {color: var(--soft); font-size: 0.86rem; line-height: 1.35}
.wide {overflow-x: auto}
table {border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums}
th, td {text-align: left; padding: 0.45rem 1rem 0.45rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top}
th[scope=col] {color: var(--soft); font-weight: 600; font-size: 0.84rem}
th[scope=row] {font-weight: 600; min-width: 7rem}
td {white-space: nowrap}
figure {margin: 1.2rem 0}
figure .wide img {display: block; height: auto; max-width: max(100%, 560px)}
figcaption {color: var(--soft); font-size: 0.88rem; margin-top: 0.4rem; max-width: 46rem}
.pairs {display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.1rem}
.pairs figure {margin: 0}
.pairs div {display: grid; grid-template-columns: 1fr 1fr; gap: 3px; border-radius: 8px;
  overflow: hidden}
.pairs img {display: block; width: 100%; height: auto}
"""
