"""Make what the page opens with: `python -m assets.world.opening`, some minutes on two CPU cores.

A real run of the page's own code: the strokes below are painted on the first example's picture, and
STEPS steps are learnt from them. The optimizer's state, two thirds of its size, is kept of the last
step alone. Beside it the pictures of all examples, before anything is learnt, and the README's
drawing of how it works.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw
from torch.nn.functional import interpolate

from pxpo import RewardSpec, Run, Segmenter, finish, judge_of, load_model, save_run
from pxpo.credit import latent_credit
from pxpo.embedded import ASSETS, OPENING
from pxpo.embedded import EXAMPLES as PICTURES
from pxpo.plots import heat_map, strip, to_picture
from pxpo.rewards.painting import FULL
from pxpo.studio import Studio
from pxpo.ui.events import EXAMPLES

FIGURE = ASSETS / "figures" / "how.jpg"
STEPS = 5
SIDE, WIDTH = 512, 28  # pixels of the canvas, and of the brush
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
    with tempfile.TemporaryDirectory() as runs:
        studio = Studio(load_model(), Segmenter(), Path(runs))
        begun = [finish(studio.start(prompt=one.prompt, seed=one.seed)) for one in EXAMPLES]
        PICTURES.mkdir(exist_ok=True)
        for example, run in zip(EXAMPLES, begun, strict=True):
            to_picture(run.picture).save(PICTURES / f"{example.seed}.jpg", quality=88)
        run = begun[0]
        for step in range(STEPS):  # painted once: from then on the wish stays
            run = finish(studio.step(run.id, RewardSpec("paint"), None if step else paint()))
    shutil.rmtree(OPENING, ignore_errors=True)
    *earlier, last = run.updates
    updates = (*(replace(one, optimizer={}) for one in earlier), last)
    run = replace(run, id="", updates=updates)
    save_run(run, OPENING)
    how_it_works(run, studio).save(FIGURE, quality=88)


def how_it_works(run: Run, studio: Studio) -> Image.Image:
    """The way from the paint to what is learnt, in pictures of the run."""
    judge = judge_of(run, studio.model, studio.tools)
    before, now = (one.shown.permute(0, 3, 1, 2) / 255 for one in (run.updates[0], run.updates[-1]))
    painted = run.painted[0].paint[None]
    reward = run.updates[1].latent_reward[:, None]
    credit = interpolate(latent_credit(reward[:, 0], run.settings)[:, None], run.size)[:, 0]
    row = [
        heat_map(before[0], interpolate(painted[None], run.size)[0, 0]),
        heat_map(before[2], judge(before)[2], FULL),
        heat_map(before[0], credit[0], 4),
        to_picture(now[0]),
        to_picture(now[2]),
    ]
    titles = [
        "painted once",
        "what that means",
        "credit by pixel",
        f"{run.count} steps on",
        "elsewhere",
    ]
    return strip([row], titles, side=220)


if __name__ == "__main__":
    main()
