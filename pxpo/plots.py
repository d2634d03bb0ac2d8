"""Pictures of a run: heat-maps (Fig. 7), evolution strips (Figs. 1, 3, 5), reward curves (4, 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREEN, RED = (20, 150, 70), (205, 40, 50)
INK, PAPER = (35, 38, 47), (255, 255, 255)
GREY, NOTHING = (120, 126, 137), (120, 126, 137, 0)
"""Ink and ground of pictures for light and dark pages alike."""

LONGEST = 80
"""Characters of a curve's title, which would take the room of the curve."""


def to_picture(image: Tensor) -> Image.Image:
    """A PIL image of one image: (3, H, W) in [0, 1], or (H, W, 3) uint8."""
    if image.dtype != torch.uint8:
        image = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(image.contiguous().numpy())


def heat_map(image: Tensor, reward_map: Tensor, limit: float | None = None) -> Image.Image:
    """The reward map (H, W) laid over its image (3, H, W) in [0, 1]: green for gain, red for loss.

    limit: the size of reward that is fully opaque; the map's own largest when None.
    """
    limit = limit or max(reward_map.abs().max().item(), 1e-12)
    strength = (reward_map / limit).clamp(-1, 1)[None]  # (1, H, W)
    tint = torch.where(strength > 0, _colour(GREEN), _colour(RED))  # (3, H, W)
    grey = 0.35 * image.mean(0, keepdim=True) + 0.65 * image
    cover = 0.8 * strength.abs()
    return to_picture(grey * (1 - cover) + tint * cover)


def _colour(rgb: tuple[int, int, int]) -> Tensor:
    return torch.tensor(rgb).view(3, 1, 1) / 255


def strip(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str],
    names: Sequence[str] = (),
    *,
    side: int = 128,
    clear: bool = False,
) -> Image.Image:
    """Rows of pictures under a line of column titles, `names` at the left of the rows.

    clear: on a transparent ground, for light and dark pages.
    """
    ink = GREY if clear else INK
    font = ImageFont.load_default(size=max(12, side // 9))
    gap, head = max(3, side // 32), side // 5
    left = max((round(font.getlength(name)) + 2 * gap for name in names), default=0)
    size = (left + len(columns) * (side + gap) + gap, head + len(rows) * (side + gap))
    sheet = Image.new("RGBA", size, NOTHING) if clear else Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, title in enumerate(columns):
        x = left + gap + place * (side + gap) + side / 2
        draw.text((x, head / 2), title, ink, font, anchor="mm")
    for line, row in enumerate(rows):
        y = head + line * (side + gap)
        if line < len(names):
            draw.text((gap, y + side / 2), names[line], ink, font, anchor="lm")
        for place, picture in enumerate(row):
            x = left + gap + place * (side + gap)
            sheet.paste(
                picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (x, y)
            )
    return sheet


def evolution(shown: Sequence[Tensor], *, columns: int = 8, rows: int = 4) -> Image.Image:
    """The strip of a run: `shown` holds (K, H, W, 3) uint8 for each update, on the same noise."""
    last = len(shown) - 1
    updates = sorted({round(i * last / (columns - 1)) for i in range(columns)})
    pictures = [
        [to_picture(shown[update][row]) for update in updates]
        for row in range(min(rows, len(shown[0])))
    ]
    return strip(pictures, [f"update {update}" for update in updates])


def reward_curve(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str = "",
    of: str = "update",
    *,
    at: Sequence[float] | None = None,
    over: str = "images",
    clear: bool = False,
) -> Figure:
    """Mean reward against updates, one line per name: (means, standard deviations over images).

    at: the points of the axis `of`, in place of 0, 1, 2, ... over: what the deviations are over.
    clear: on a transparent ground, for light and dark pages.
    """
    title = " ".join(title.split())
    if len(title) > LONGEST:
        title = f"{title[: LONGEST - 1]}…"
    import matplotlib.figure  # here, as it would be a twentieth of the app's start
    import matplotlib.ticker

    look: dict[str, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    if clear:
        parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        look |= {part: tuple(value / 255 for value in GREY) for part in parts}
        look |= {"figure.facecolor": "none", "axes.facecolor": "none"}
    with matplotlib.rc_context(look):
        figure = matplotlib.figure.Figure(figsize=(7, 3.6), layout="constrained", dpi=120)
        axes = figure.subplots()
        for number, (name, (means, deviations)) in enumerate(lines.items()):
            x = np.arange(len(means)) if at is None else np.asarray(at)
            middle, band = np.asarray(means), np.asarray(deviations)
            (line,) = axes.plot(x, middle, marker="osD^"[number % 4], markersize=4, label=name)
            axes.fill_between(
                x, middle - band, middle + band, color=line.get_color(), alpha=0.15, linewidth=0
            )
        axes.set_xlabel(of)
        axes.set_ylabel(f"mean reward per pixel (± over {over})")
        axes.set_title(title, loc="left", parse_math=False)  # a person may have worded it
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        if len(lines) > 1:
            axes.legend(frameon=False)
    return figure
