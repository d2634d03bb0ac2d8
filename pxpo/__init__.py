"""PXPO: pixel-wise reinforcement learning for diffusion models (arXiv 2404.04356).

    from pxpo import *

    model = load_model()                       # Tiny World; or a folder, or a Hub id
    session = finish(new_session(model, settings_for("color")))
    for _ in range(10):
        session = finish(generate(model, session))
        maps = ColorReward("blue")(session.trajectory.images)
        session = finish(learn(model, session, maps))
    save_lora(session.lora, "my-lora")

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

from .config import EXPERIMENTS, Settings, settings_for
from .errors import PxpoError
from .lora import Lora, adapter, load_lora, new_lora, save_lora
from .models import DiffusionModel, load_model
from .rewards import ColorReward, Segmenter, SegmentReward, paint_by_label, painted_map
from .rollout import Noise, Progress, Trajectory, finish, rollout
from .session import (
    Session,
    Snapshot,
    annotate,
    back,
    generate,
    learn,
    new_session,
    resume,
    save,
)
from .update import update

__version__ = "0.1.0"

__all__ = [
    "EXPERIMENTS", "ColorReward", "DiffusionModel", "Lora", "Noise", "Progress", "PxpoError",
    "SegmentReward", "Segmenter", "Session", "Settings", "Snapshot", "Trajectory", "adapter",
    "annotate", "back", "finish", "generate", "learn", "load_lora", "load_model", "new_lora",
    "new_session", "paint_by_label", "painted_map", "resume", "rollout", "save", "save_lora",
    "settings_for", "update",
]  # fmt: skip
