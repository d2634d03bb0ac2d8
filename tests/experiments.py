"""The paper's three experiments on Tiny World, and paint that stays, as on the page, measured:
`python tests/experiments.py --help`.

Each prints one JSON line per run, with the figures before and after on seeds no update ever saw,
and with --out writes the strips. Not a test: it takes minutes, and its figures go into the README.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pxpo import (  # noqa: E402
    ColorReward,
    DiffusionModel,
    Lora,
    Noise,
    Run,
    Segmenter,
    SegmentReward,
    Settings,
    adapter,
    begin,
    finish,
    generate,
    learn,
    load_model,
    new_lora,
    paint_by_label,
    rollout,
    settings_for,
)
from pxpo.__main__ import quiet  # noqa: E402
from pxpo.plots import strip, to_picture  # noqa: E402
from pxpo.settings import PAINTED  # noqa: E402

HELD_OUT = 10_000_000  # seeds from here on are for measuring


def sample(model: DiffusionModel, lora: Lora, settings: Settings, seeds: range) -> Tensor:
    """Images (B, 3, H, W) of these seeds with the LoRA."""
    with adapter(model, lora):
        prompts = [settings.prompt] * len(seeds)
        return finish(rollout(model, prompts, [Noise(seed) for seed in seeds], settings)).images


def held_out(images: Tensor) -> range:
    """The seeds that no update ever sees, one for each of the images."""
    return range(HELD_OUT, HELD_OUT + len(images))


def area(segmenter: Segmenter, images: Tensor, label: str) -> Tensor:
    """Share (B,) of each image that the segmenter takes for `label`."""
    return (segmenter.classes(images) == segmenter.index(label)).float().mean((1, 2))


def spread_of_color(segmenter: Segmenter, images: Tensor, label: str) -> float:
    """Standard deviation over images of the mean colour of `label`, averaged over the channels."""
    mask = (segmenter.classes(images) == segmenter.index(label))[:, None].float()
    size = mask.sum((1, 2, 3))
    means = (images * mask).sum((2, 3))[size > 50] / size[size > 50, None]
    return means.std(0).mean().item() if len(means) > 1 else 0.0


def train(model: DiffusionModel, settings: Settings, reward, epochs: int | None = None) -> Run:  # noqa: ANN001
    run = finish(begin(model, settings))
    for _ in range(epochs or settings.epochs):
        run = finish(generate(model, run))
        run = finish(learn(model, run, reward(run.trajectory.images)))
    return run


def color(model: DiffusionModel, segmenter: Segmenter, settings: Settings, before: Tensor) -> dict:
    run = train(model, settings, ColorReward("blue"))
    after = sample(model, run.lora, settings, held_out(before))
    had, has = (area(segmenter, images, "Taxi") > 0.02 for images in (before, after))
    blue = [images[:, 2].mean((1, 2)) for images in (before, after)]
    figures = {
        "blue": [round(-b.mean().item(), 4) for b in blue],
        "blue_std": [round(b.std().item(), 4) for b in blue],
        "better": round(1 - (blue[1].mean() / blue[0].mean()).item(), 3),
        "taxi_kept": round((had & has).sum().item() / max(had.sum().item(), 1), 3),
        "had_taxi": had.float().mean().item(),
    }
    return {"figures": figures, "run": run, "before": before, "after": after}


def hair(model: DiffusionModel, segmenter: Segmenter, settings: Settings, before: Tensor) -> dict:
    reward = SegmentReward(segmenter, ["Hair"])
    run = train(model, settings, reward)
    after = sample(model, run.lora, settings, held_out(before))
    rewards = [reward(images).mean((1, 2)) for images in (before, after)]
    had, has = (area(segmenter, images, "Face") > 0.03 for images in (before, after))
    spread = {
        label: [spread_of_color(segmenter, images, label) for images in (before, after)]
        for label in ("Face", "Upper-clothes")
    }
    figures = {
        "hair": [round(r.mean().item(), 4) for r in rewards],
        "hair_std": [round(r.std().item(), 4) for r in rewards],
        "left": round((rewards[1].mean() / rewards[0].mean()).item(), 3),
        "face_kept": round((had & has).sum().item() / max(had.sum().item(), 1), 3),
        "face_spread_kept": round(spread["Face"][1] / max(spread["Face"][0], 1e-9), 3),
        "shirt_spread_kept": round(
            spread["Upper-clothes"][1] / max(spread["Upper-clothes"][0], 1e-9), 3
        ),
    }
    return {"figures": figures, "run": run, "before": before, "after": after}


def paint(
    model: DiffusionModel, segmenter: Segmenter, settings: Settings, before: Tensor,
    more: str, less: str,
) -> dict:  # fmt: skip
    run = train(model, settings, lambda images: paint_by_label(segmenter, images, [more], [less]))
    own = range(settings.seed, settings.seed + 1)
    pictures = {
        "own": [
            sample(model, update.lora, settings, own)
            for update in (run.updates[0], run.updates[-1])
        ],
        "held_out": [before, sample(model, run.lora, settings, held_out(before))],
    }
    figures = {}
    for where, images in pictures.items():
        for name, label in (("more", more), ("less", less)):
            sizes = [area(segmenter, x, label).mean().item() for x in images]
            figures[f"{where}_{name}"] = [round(size, 4) for size in sizes]
    figures["reached"] = {
        where: figures[f"{where}_more"][1] >= 3 * max(figures[f"{where}_more"][0], 0.01)
        and figures[f"{where}_less"][1] <= figures[f"{where}_less"][0] / 5
        for where in ("own", "held_out")
    }
    return {
        "figures": figures,
        "run": run,
        "before": before,
        "after": pictures["held_out"][1],
    }


def stays(model: DiffusionModel, segmenter: Segmenter, settings: Settings) -> dict:
    """As on the page: paint on the first picture that stays, lake green and trees red."""
    first = finish(begin(model, settings)).trajectory.images
    painted = paint_by_label(segmenter, first, ["Lake"], ["Tree"])
    run = train(model, settings, lambda images: painted)
    images = [
        update.shown.permute(0, 3, 1, 2) / 255 for update in (run.updates[0], run.updates[-1])
    ]
    change = (images[1] - images[0]).abs().mean(1)
    figures = {
        name: [round(area(segmenter, x, label).item(), 4) for x in images]
        for name, label in (("more", "Lake"), ("less", "Tree"))
    }
    figures["change_in_paint"] = round(change[painted != 0].mean().item(), 4)
    figures["change_outside"] = round(change[painted == 0].mean().item(), 4)
    return {"figures": figures, "run": run, "before": images[0], "after": images[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", choices=["color", "hair", "lake", "trees", "stays"])
    parser.add_argument("--seeds", type=int, default=1, help="runs, on seeds 0, 1, ...")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model")
    parser.add_argument("--segmenter")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    changes = dict(one.split("=", 1) for one in options.set)
    kind = {"color": "color", "hair": "segment"}.get(options.experiment, "paint")
    types = {name: type(value) for name, value in settings_for(kind).as_dict().items()}
    changes = {name: types[name](value) for name, value in changes.items()}
    model, segmenter = load_model(options.model), Segmenter(options.segmenter)
    preset = {**PAINTED, "epochs": 5} if options.experiment == "stays" else {}
    base = settings_for(kind, paper=options.paper, **{**preset, "shown": 1, **changes})
    if options.experiment != "stays":  # the same for every run: a new LoRA changes nothing
        seeds = range(HELD_OUT, HELD_OUT + options.held_out)
        before = sample(model, new_lora(model, base.rank, base.seed), base, seeds)
    for seed in range(options.first, options.first + options.seeds):
        settings = replace(base, seed=seed)
        started = time.perf_counter()
        if options.experiment == "color":
            result = color(model, segmenter, settings, before)
        elif options.experiment == "hair":
            result = hair(model, segmenter, settings, before)
        elif options.experiment == "stays":
            result = stays(model, segmenter, settings)
        else:
            wish = ("Lake", "Tree") if options.experiment == "lake" else ("Tree", "Lake")
            result = paint(model, segmenter, settings, before, *wish)
        seconds = time.perf_counter() - started
        line = {"experiment": options.experiment, "seed": seed, "paper": options.paper, **changes,
                **result["figures"], "seconds": round(seconds, 1)}  # fmt: skip
        print(json.dumps(line), flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            name = f"{options.experiment}-{seed}" + "".join(f"-{x}" for x in options.set)
            updates = result["run"].updates
            counts = sorted({round(i * (len(updates) - 1) / 7) for i in range(8)})
            rows = [
                [to_picture(updates[count].shown[0]) for count in counts],
                [to_picture(image) for image in result["before"][:8]],
                [to_picture(image) for image in result["after"][:8]],
            ]
            names = ["this seed", "others before", "others after"]
            sheet = strip(rows, [f"update {count}" for count in counts], names)
            sheet.save(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
