"""DDPO by TRL's trainer and by ours, side by side: `python -m tests.peer`.

Wants TRL beside the project: `pip install trl==0.22.2`, the last version that has the trainer. Both
open the same diffusers folder and learn the same: prompt, batch, steps, guidance, rank, targets,
rate, and an image's mean of minus blue as its reward. Each turn of each is a process of its own;
they take turns, so that what else the machine does falls on all alike.

`--profile` says instead what an epoch of ours at equal maths spends its time on, on one core, and
how fast that is beside a large plain matrix product: how much is left to be won.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from pxpo import ColorReward, Noise, adapter, finish, load_model, new_lora, rollout
from pxpo.credit import downsample, latent_credit
from pxpo.embedded import TINY_WORLD
from pxpo.lora import TARGETS
from pxpo.models import memory
from pxpo.run import WEIGHT_DECAY
from pxpo.settings import Settings
from pxpo.update import update

PROMPT, BATCH, STEPS, GUIDANCE, RANK, RATE = "red taxi in traffic", 8, 20, 3.0, 4, 3e-4

EQUAL = {
    "blur": float("inf"), "baseline": "global", "strength": 0.0, "learning_rate": RATE,
    "hold": 0.0, "step_noise": "drawn", "unconditional": "exact", "timesteps": 1.0,
}  # fmt: skip
SHORTCUTS = {**EQUAL, "unconditional": "detached", "timesteps": 0.5}

Epochs = Iterator[float]
"""Does one epoch (sample, judge, learn) at each step, and gives the mean reward of its images."""


def ours(**how: Any) -> Epochs:
    settings = Settings(
        prompt=PROMPT, images=BATCH, steps=STEPS, guidance_scale=GUIDANCE, rank=RANK, **how
    )
    model = load_model(TINY_WORLD)
    with adapter(model, new_lora(model, RANK, 0)) as parameters:
        optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=WEIGHT_DECAY)
        for epoch in range(10**9):
            noise = [Noise(epoch * BATCH + image) for image in range(BATCH)]
            trajectory = finish(rollout(model, [PROMPT] * BATCH, noise, settings))
            maps = ColorReward("blue")(trajectory.images)
            credit = latent_credit(downsample(maps, trajectory.size), settings)
            generator = torch.Generator().manual_seed(epoch)
            finish(
                update(model, parameters, optimizer, trajectory, credit, settings,
                       generator=generator)
            )  # fmt: skip
            yield maps.mean().item()


def trl() -> Epochs:
    warnings.simplefilter("ignore")
    from accelerate import PartialState
    from peft import LoraConfig
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    class WithLora(DefaultDDPOStableDiffusionPipeline):
        def get_trainable_layers(self) -> Any:
            config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))
            self.sd_pipeline.unet.add_adapter(config)
            return self.sd_pipeline.unet

    rewards: list[float] = []

    def judge(images: torch.Tensor, *_: Any) -> tuple[torch.Tensor, dict]:
        each = -images[:, 2].float().mean((1, 2))
        rewards.append(each.mean().item())
        return each, {}

    with tempfile.TemporaryDirectory() as logs:
        config = DDPOConfig(
            num_epochs=1, save_freq=10**9, mixed_precision="no", sample_num_steps=STEPS,
            sample_guidance_scale=GUIDANCE, sample_batch_size=BATCH,
            sample_num_batches_per_epoch=1, train_batch_size=BATCH, train_learning_rate=RATE,
            project_kwargs={"project_dir": logs}, logdir=logs,
        )  # fmt: skip
        PartialState()  # without it, TRL's own warning is an error
        pipeline = WithLora(str(TINY_WORLD))
        trainer = DDPOTrainer(config, judge, lambda: (PROMPT, {}), pipeline)
        for epoch in range(10**9):
            trainer.step(epoch, epoch)
            yield rewards[-1]


WAYS: dict[str, Callable[[], Epochs]] = {
    "TRL 0.22.2": trl,
    "ours, equal maths": lambda: ours(**EQUAL),
    "ours, half of the steps, detached": lambda: ours(**SHORTCUTS),
}


def one(name: str, epochs: int) -> dict[str, Any]:
    """Seconds an image by epoch, the first left out; rewards; and the process's peak, in GB."""
    rewards, times, work = [], [], WAYS[name]()
    for _ in range(epochs + 1):
        started = time.perf_counter()
        rewards.append(next(work))
        times.append((time.perf_counter() - started) / BATCH)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": times[1:], "rewards": rewards, "peak": peak}


KINDS = {
    "convolutions": ("convolution", "conv2d"),
    "matrix products": ("addmm", "aten::mm", "bmm", "baddbmm"),
    "attention": ("scaled_dot_product",),
}
"""What nearly all floating-point operations are spent in, by parts of torch's names for it."""


def profile() -> None:
    """Prints an epoch's time by kind of operation, on one core."""
    memory.CORES = 1
    torch.set_num_threads(1)
    epochs = ours(**EQUAL)
    next(epochs)
    with FlopCounterMode(display=False) as flops:
        next(epochs)
    with torch.profiler.profile() as profiler:
        next(epochs)
    spent = dict.fromkeys([*KINDS, "all else that torch does"], 0.0)
    for event in profiler.key_averages():
        kind = next(
            (kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)),
            "all else that torch does",
        )
        spent[kind] += event.self_cpu_time_total / 1e6
    whole, left, right = sum(spent.values()), *torch.randn(2, 1024, 1024)
    best = 2 * 1024**3 / Timer("left @ right", globals=locals()).blocked_autorange().median
    print("| | seconds | share |\n|---|---|---|")
    for kind, seconds in spent.items():
        print(f"| {kind} | {seconds:.2f} | {seconds / whole:.0%} |")
    work, counted = flops.get_total_flops(), sum(spent[kind] for kind in KINDS)
    print(f"\nThe first three: {work / 1e9:.0f} GFLOP, {work / counted / 1e9:.0f} a second; a "
          f"product of 1024 x 1024: {best / 1e9:.0f}. An epoch at that speed, and nothing else: "
          f"{work / best / whole:.2f} of its time.")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="of ours, at equal maths")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.epochs)))
        return
    if options.profile:
        profile()
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _ in range(options.turns):
        for name, lines in found.items():
            command = [
                sys.executable,
                "-m",
                "tests.peer",
                "--one",
                name,
                "--epochs",
                str(options.epochs),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
            lines.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"Tiny World, {BATCH} images, {STEPS} steps, guidance {GUIDANCE}, rank {RANK}, "
          f"{torch.get_num_threads()} threads, {options.turns} turns\n")  # fmt: skip
    print("| | s an image | of TRL's | peak, GB | mean reward of the first and last epoch |")
    print("|---|---|---|---|---|")
    theirs = 0.0
    for name, lines in found.items():
        seconds = statistics.median(one for line in lines for one in line["seconds"])
        theirs = theirs or seconds
        peaks = [line["peak"] for line in lines]
        first, last = (statistics.mean(line["rewards"][at] for line in lines) for at in (0, -1))
        print(f"| {name} | {seconds:.2f} | {seconds / theirs:.2f} | "
              f"{min(peaks):.2f} to {max(peaks):.2f} | {first:.3f}, {last:.3f} |")  # fmt: skip


if __name__ == "__main__":
    main()
