"""The folder of a finished LoRA, which stands by itself: any diffusers user can load and judge it.

pytorch_lora_weights.safetensors   what was learnt, in diffusers' format
lora_comfyui_a1111.safetensors     the same by kohya's names, for ComfyUI and A1111
README.md                          the model card, with the code that loads it
run.json                           each update's reward, settings and numbers; versions
before.png, after.png, strip.png, reward.png
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DDIMScheduler
from huggingface_hub import ModelCard, ModelCardData

from .embedded import TINY_WORLD
from .lora_files import COMFYUI_FILE, save_lora
from .models.single_file import inspected
from .pages import code, plain
from .plots import evolution, reward_curve, to_picture
from .run import Run, Update, shown_noise, shown_prompts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LICENSES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}
"""Licences of well-known base models; a LoRA inherits its base's."""

PROGRAMS = f"""
For ComfyUI put `{COMFYUI_FILE}` into `models/loras`, for A1111 into `models/Lora`, and choose it
with a checkpoint of {{base}}.
"""

TEXT = """
# {title}

A LoRA of {base} taught by feedback that says *where*: {count} updates of pixel-wise reinforcement
learning (PXPO, [arXiv 2404.04356](https://arxiv.org/abs/2404.04356)) on the prompt
*{prompt}*. The reward: {rewards}.

| before | after |
|---|---|
| ![before](before.png) | ![after](after.png) |

![One column an update, one row a seed](strip.png)
{curve}
## Use it

```python
{code}
```

This is `after.png`{alike}.{where}
{programs}
## What taught it

| updates | reward | settings of these updates alone |
|---|---|---|
{taught}

Settings of all updates:

| | |
|---|---|
{settings}

The strip's first row is the seed that was learnt on, {seed}; the other rows are held-out seeds.
Made with PXPO Studio, diffusers {diffusers}, torch {torch}.
"""

SAME = ", on the machine that made it bit for bit if the UNet ran in float32"

ALMOST_1 = 0.99999
ALMOST_SAME = """ but for rounding: at eta = 1 a stock pipeline's picture may be black, as its first
step, which starts without any signal, takes the root of a rounding error"""

ELSEWHERE = """ Its base, {base}, is not on the Hub: it comes with PXPO Studio
(`assets/tiny_world`) or was made elsewhere; put its path in place of the first one above."""


@dataclass(frozen=True)
class Base:
    """The base model as a card speaks of it. hub: whether `name` is a Hub id."""

    name: str
    license: str
    hub: bool


def base_of(model_name: str) -> Base:
    """The base that `load_model(model_name)` loads; the network is not asked."""
    if Path(model_name) == TINY_WORLD:
        return Base("Tiny World", "apache-2.0", hub=False)
    if Path(model_name).exists():
        card = Path(model_name) / "README.md"
        known = ModelCard.load(card).data.license if card.exists() else None
        return Base(Path(model_name).name, known or "other", hub=False)
    return Base(model_name, LICENSES.get(model_name, "other"), hub=True)


def write_folder(run: Run, folder: Path, *, repo: str = "", with_base: bool = False) -> Path:
    """Write everything into `folder`, a new one or one that an earlier call wrote.

    repo: the Hub id it will have, for the card's code; the folder's own path when empty.
    with_base: the card's code takes the base from beside the LoRA, where `push` puts it.
    """
    folder = Path(folder)
    save_lora(run.lora, folder)
    for name, update in (("before", run.updates[0]), ("after", run.updates[-1])):
        to_picture(update.shown[0]).save(folder / f"{name}.png")
    seeds = run.settings.shown  # held-out prompts come after these
    evolution([update.shown[:seeds] for update in run.updates]).save(folder / "strip.png")
    curve = score_curve(run)
    if curve:
        curve.savefig(folder / "reward.png")
    record = {
        "base": base_of(run.model_name).name,
        "updates": [update.as_dict() for update in run.updates],
        "shown_seeds": [noise.start for noise in shown_noise(run.settings)],
        "shown_prompts": shown_prompts(run.settings),
        "versions": {name: version(name) for name in ("diffusers", "peft", "torch")},
    }
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    card = _card(run, folder, repo, bool(curve), with_base)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def score_curve(run: Run, *, page: bool = False) -> Figure | None:
    """The last reward by update, on this seed and on held-out ones; None before the first one.

    page: for the page, in its words and on a ground that shows through.
    """
    update, held_out = ("step", "other") if page else ("update", "held-out")
    scores = run.latest
    if len(scores) < 2:
        return None
    lines = {"this seed": ([one.here for one in scores], [0.0] * len(scores))}
    if scores[0].held_out is not None:
        means = [one.held_out or 0.0 for one in scores]
        lines[f"{held_out} seeds"] = means, [one.held_out_std or 0.0 for one in scores]
    if scores[0].held_out_prompts is not None:
        lines[f"{held_out} prompts"] = (
            [one.held_out_prompts or 0.0 for one in scores], [0.0] * len(scores),
        )  # fmt: skip
    title = f"Reward: {run.reward.name if run.reward else ''}"
    return reward_curve(lines, title, update, clear=page)


def _name_of(update: Update) -> str:
    return update.reward.name if update.reward else "maps from Python"


def _common(run: Run) -> dict[str, Any]:
    """The settings that all updates had."""
    first, *others = [_counted(update) for update in run.updates[1:] or run.updates]
    return {name: v for name, v in first.items() if all(one.get(name) == v for one in others)}


def _counted(update: Update) -> dict[str, Any]:
    """The settings that made a difference: where strength says how far, no rate does."""
    settings = update.settings
    prompts = {"prompt": settings.prompts, "held_out_prompt": settings.held_out_prompts}
    counted = settings.as_dict() | {name: " / ".join(some) for name, some in prompts.items()}
    if settings.strength:
        del counted["learning_rate"]
    if not settings.held_out_prompts:
        del counted["held_out_prompt"]
    return counted


def _taught(run: Run) -> list[str]:
    """A row of the card's table for each stretch of updates that were taught alike."""
    common, rows, number = _common(run), [], 1
    for (name, own), alike in groupby(
        run.updates[1:],
        lambda one: (
            _name_of(one), {k: v for k, v in _counted(one).items() if k not in common},
        ),
    ):  # fmt: skip
        last = number + len(list(alike)) - 1
        updates = f"{number}" if last == number else f"{number} to {last}"
        changed = ", ".join(f"{setting} {code(str(value))}" for setting, value in own.items())
        rows.append(f"| {updates} | {plain(name)} | {changed} |")
        number = last + 1
    return rows


def _card(run: Run, folder: Path, repo: str, curve: bool, with_base: bool) -> str:
    settings, base = run.settings, base_of(run.model_name)
    adapter = {"base_model": base.name, "base_model_relation": "adapter"} if base.hub else {}
    about: dict[str, Any] = {
        **adapter,
        "widget": [{"text": settings.prompts[0], "output": {"url": "after.png"}}],
    }
    data = ModelCardData(
        license=base.license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion", "pxpo"],
        instance_prompt=settings.prompts[0],
        **about,
    )
    rewards = dict.fromkeys(_name_of(update) for update in run.updates[1:])
    text = TEXT.format(
        title=plain(repo.split("/")[-1] or folder.resolve().name),
        base=f"[{base.name}](https://huggingface.co/{base.name})" if base.hub else base.name,
        count=run.count,
        prompt="*, *".join(map(plain, settings.prompts)),
        rewards="; ".join(map(plain, rewards)) or "none yet",
        curve="\n![The reward by update, ± over images](reward.png)\n" if curve else "",
        code=_code(run, repo, folder, base, with_base),
        programs="" if base.name == "Tiny World" else PROGRAMS.format(base=base.name),
        alike=ALMOST_SAME if _starts_without_signal(run.model_name) else SAME,
        where="" if base.hub or with_base else ELSEWHERE.format(base=base.name),
        taught="\n".join(_taught(run)),
        settings="\n".join(f"| {n} | {code(str(value))} |" for n, value in _common(run).items()),
        seed=settings.seed,
        diffusers=version("diffusers"),
        torch=version("torch"),
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def _code(run: Run, repo: str, folder: Path, base: Base, with_base: bool) -> str:
    """What the card shows: a stock pipeline that makes after.png."""
    settings = run.settings
    eta = min(settings.eta, ALMOST_1) if _starts_without_signal(run.model_name) else settings.eta
    fetch = f"folder = snapshot_download({repo!r})\n" if with_base and not base.hub else ""
    # What leaves this machine does not tell its folders.
    known = Path(run.model_name).name if repo and not base.hub else run.model_name
    repo = repo or str(folder)
    base_code = 'f"{folder}/base"' if fetch else repr(known)
    pipeline, opened, schedule = "DiffusionPipeline", f"from_pretrained({base_code})", ""
    if Path(run.model_name).is_file():
        found = inspected(run.model_name)
        pipeline = found.pipeline_class.__name__
        opened = f"from_single_file({base_code}, dtype=torch.float32)"
        schedule = "".join(f", {name}={value!r}" for name, value in found.schedule.items())
    lines = [
        "import torch",
        f"from diffusers import DDIMScheduler, {pipeline}",
        *(["from huggingface_hub import snapshot_download"] if fetch else []),
        "",
        f"{fetch}pipeline = {pipeline}.{opened}",
        "pipeline.scheduler = DDIMScheduler.from_config(",
        f"    pipeline.scheduler.config, clip_sample=False{schedule}",
        ")",
        f"pipeline.load_lora_weights({'folder' if fetch else repr(repo)})",
        f"picture = pipeline({settings.prompts[0]!r}, num_inference_steps={settings.steps}, "
        f"guidance_scale={settings.guidance_scale}, eta={eta}, height={run.size[0]}, "
        f"width={run.size[1]}, "
        f"generator=torch.Generator().manual_seed({settings.seed})).images[0]",
    ]
    return "\n".join(lines)


def _starts_without_signal(model_name: str) -> bool:
    """Whether the model's schedule has zero terminal SNR; the network is not asked."""
    if Path(model_name).is_file():
        return "rescale_betas_zero_snr" in inspected(model_name).schedule
    with suppress(OSError, ValueError):  # it is not at hand
        config = DDIMScheduler.load_config(model_name, subfolder="scheduler", local_files_only=True)
        return bool(config.get("rescale_betas_zero_snr"))
    return False
