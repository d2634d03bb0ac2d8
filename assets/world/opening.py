"""Make what the page opens with: `python -m assets.world.opening`, a minute on two CPU cores.

A real run of the page's own code: the strokes below are painted on the first example's picture,
STEPS steps are learnt from them, and the picture before and after is kept with the paint.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from pxpo import RewardSpec, Segmenter, finish, load_model
from pxpo.plots import to_picture
from pxpo.studio import Studio

FOLDER = Path(__file__).resolve().parents[1] / "opening"
PROMPT, SEED = "nature landscape", 12
STEPS = 8
SIDE, WIDTH = 512, 40  # pixels of the canvas, and of the brush
STROKES = {
    (0, 255, 0, 153): [((125, 390), (290, 390))],  # on the lake
    (255, 0, 0, 153): [((235, 215), (235, 315)), ((366, 235), (366, 320))],  # on two trees
}


def paint() -> Image.Image:
    """The strokes as the editor would hand them over."""
    layer = Image.new("RGBA", (SIDE, SIDE))
    draw = ImageDraw.Draw(layer)
    for color, strokes in STROKES.items():
        for start, end in strokes:
            draw.line([start, end], color, WIDTH)
            for x, y in (start, end):
                radius = WIDTH // 2
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)
    return layer


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as runs:
        studio = Studio(load_model(), Segmenter(), Path(runs))
        run = finish(studio.start(prompt=PROMPT, seed=SEED))
        for step in range(STEPS):  # painted once: from then on the wish stays
            run = finish(studio.step(run.id, RewardSpec("paint"), None if step else paint()))
    shown = [update.shown[0] for update in run.updates]
    for name, image in (("before", shown[0]), ("after", shown[-1])):
        to_picture(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(
            FOLDER / f"{name}.png"
        )
    paint().save(FOLDER / "paint.png")


if __name__ == "__main__":
    main()
