"""PXPO: pixel-wise reinforcement learning for diffusion models (arXiv 2404.04356).

    from pxpo import *

    model = load_model()                       # Tiny World; or a folder, a file, a Hub id
    run = finish(begin(model, settings_for("color")))
    for _ in range(10):
        run = finish(generate(model, run))
        maps = ColorReward("blue")(run.trajectory.images)
        run = finish(learn(model, run, maps))
    save_lora(run.lora, "my-lora")

Shapes: B images, T steps, C latent channels, h x w the latent's size, H x W the image's. Images
are (B, 3, H, W) in [0, 1], reward maps (B, H, W), latent rewards and credits (B, h, w).

The way: prompt -> rollout -> trajectory -> images -> reward maps -> latent credit -> update.
"""

import os

# Else transformers warns that torchvision is missing, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Else OpenMP's threads wait for one another without letting go of their cores: two of them beside
# other work take nearly three times as long, and alone no less. Read as torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from .errors import PxpoError
from .lora import Lora, adapter, completed, new_lora
from .lora_files import load_lora, save_lora
from .models import DiffusionModel, load_model
from .progress import Progress, finish
from .rewards import (
    REWARDS,
    ColorReward,
    RewardSpec,
    Segmenter,
    SegmentReward,
    Tools,
    Wish,
    paint_by_label,
    painted_map,
)
from .rollout import Noise, Trajectory, rollout
from .run import (
    Run,
    Score,
    Update,
    annotate,
    begin,
    generate,
    go_to,
    judge_of,
    learn,
    paint,
    scored,
    teach,
)
from .settings import EXPERIMENTS, Settings, settings_for
from .store import load_run, save_run
from .update import update

__version__ = "0.1.0"

__all__ = [
    "EXPERIMENTS", "REWARDS", "ColorReward", "DiffusionModel", "Lora", "Noise", "Progress",
    "PxpoError", "RewardSpec", "Run", "Score", "SegmentReward", "Segmenter", "Settings", "Tools",
    "Trajectory", "Update", "Wish", "adapter", "annotate", "begin", "completed", "finish",
    "generate", "go_to", "judge_of", "learn", "load_lora", "load_model", "load_run", "new_lora",
    "paint", "paint_by_label", "painted_map", "rollout", "save_lora", "save_run", "scored",
    "settings_for", "teach", "update",
]  # fmt: skip
