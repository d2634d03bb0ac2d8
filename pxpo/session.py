"""A person's run as plain data on the CPU, and its verbs, each a function from Session to Session.

    session = finish(new_session(model, settings))
    session = finish(generate(model, session))               # the images to judge
    session = finish(learn(model, session, maps))            # one update from their reward maps

Nothing here is changed in place, so a session can be kept, handed on and gone back to at will.
`generate` and `learn` are generators: they yield Progress, and closing one leaves the session and
the model as they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors
from torch import Tensor

from .config import Settings
from .credit import downsample, filled, latent_credit
from .errors import RewardError, RunError
from .lora import Lora, adapter, new_lora, weights_of
from .models import DiffusionModel
from .rollout import Noise, Progress, Trajectory, derived_seed, rollout
from .steps import Steps
from .update import Report, update

FORMAT = 3
"""Version of the files that `save` writes."""

SHOWING = "showing"
"""The phase in which the shown image of the run's own seed is made."""


@dataclass(frozen=True)
class Snapshot:
    """The run after some number of updates.

    optimizer: AdamW's state by parameter name and moment. shown: (K, H, W, 3) uint8, images on
    noise that is the same at every step. latent_reward: (B, h, w), the reward that led here; of no
    images at the beginning. metrics: numbers about the update that led here.
    """

    lora: Lora
    optimizer: dict[str, Tensor]
    shown: Tensor
    latent_reward: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class Session:
    """A run: its settings, a snapshot per update (the first before any), and the images now judged.

    trajectory is None where `generate` has them still to make.
    """

    settings: Settings
    model_name: str
    history: tuple[Snapshot, ...]
    trajectory: Trajectory | None = None

    @property
    def step(self) -> int:
        """The number of updates so far."""
        return len(self.history) - 1

    @property
    def lora(self) -> Lora:
        return self.history[-1].lora


def new_session(
    model: DiffusionModel, settings: Settings, lora: Lora | None = None
) -> Generator[Progress, None, Session]:
    """A run that has learnt nothing yet, or goes on from `lora`."""
    lora = lora or new_lora(model, settings.rank, settings.seed)
    with adapter(model, lora):
        shown, judged = yield from _show(model, settings)
    nothing = torch.zeros(0, *model.latent_shape[1:])
    return Session(settings, model.name, (Snapshot(lora, {}, shown, nothing, {}),), judged)


def generate(model: DiffusionModel, session: Session) -> Generator[Progress, None, Session]:
    """Sample the images that the next update will judge, unless they are there already."""
    if session.trajectory is not None:
        return session
    settings = session.settings
    noise = [training_noise(settings, session.step, index) for index in range(settings.images)]
    with adapter(model, session.lora):
        trajectory = yield from rollout(model, [settings.prompt] * len(noise), noise, settings)
    return replace(session, trajectory=trajectory)


def learn(
    model: DiffusionModel, session: Session, reward_maps: Tensor
) -> Generator[Progress, None, Session]:
    """One update from the reward maps (B, H, W) of the images that `generate` made.

    Where they earn nothing, nothing is learnt, and the next images come from the next noise.
    Raises RewardError for maps that do not fit, DivergedError for a gradient that is not finite;
    the session is then as it was.
    """
    settings, trajectory = session.settings, session.trajectory
    if trajectory is None:
        raise RunError("there are no images to learn from yet; generate them first.")
    if len(reward_maps) != len(trajectory.images):
        raise RewardError(
            f"there are {len(reward_maps)} reward maps for {len(trajectory.images)} images."
        )
    latent_reward = downsample(reward_maps.float(), trajectory.size)
    past = []
    if settings.baseline == "past":  # what was painted once is meant from then on
        past = [snapshot.latent_reward for snapshot in session.history[1:]]
    credit = latent_credit(latent_reward, settings, past)
    said = torch.stack([latent_reward, *past]).abs().amax(dim=0)
    silence = 1 - (1 - settings.hold_painted) * said / said.max().clamp(min=1e-12)
    silence *= 1 + settings.hold_growth * filled(latent_reward, past)[:, None, None]
    before = session.history[-1]
    metrics = {
        "reward": reward_maps.mean().item(),
        "reward_std": reward_maps.mean((1, 2)).std(correction=0).item(),
    }
    if not credit.any():
        metrics |= asdict(Report(0.0, 0.0))
        snapshot = replace(before, latent_reward=latent_reward, metrics=metrics)
        return replace(session, history=(*session.history, snapshot), trajectory=None)
    learning = replace(settings, learning_rate=learning_rate(settings, session.step))
    with adapter(model, before.lora) as parameters:
        optimizer = _optimizer(parameters, learning, before.optimizer)
        report = yield from update(
            model, parameters, optimizer, trajectory, credit, learning, silence=silence,
            generator=torch.Generator().manual_seed(derived_seed(settings.seed, session.step, 2)),
        )  # fmt: skip
        lora = replace(before.lora, weights=weights_of(parameters))
        state = _optimizer_state(parameters, optimizer)
        shown, judged = yield from _show(model, settings)
    snapshot = Snapshot(lora, state, shown, latent_reward, metrics | asdict(report))
    return replace(session, history=(*session.history, snapshot), trajectory=judged)


def back(session: Session, step: int) -> Session:
    """The run as it was after `step` updates: weights, optimizer, images and randomness.

    Going on from there with the same maps gives the same run again, bit for bit.
    """
    if not 0 <= step <= session.step:
        raise RunError(f"there is no step {step} to go back to; this run has 0 to {session.step}.")
    return replace(session, history=session.history[: step + 1], trajectory=None)


def annotate(session: Session, **numbers: float) -> Session:
    """The session with more numbers in its newest snapshot's metrics."""
    newest = session.history[-1]
    newest = replace(newest, metrics={**newest.metrics, **numbers})
    return replace(session, history=(*session.history[:-1], newest))


def training_noise(settings: Settings, step: int, index: int) -> Noise:
    """The noise of image `index` of update `step`, as `settings.noise` says.

    Where the whole noise or its start is kept, the first image is the one that a stock pipeline
    gives for `settings.seed`, and the next ones of this `index` have its x_T. With "turns" every
    second one has it; the first has not, as AdamW's first updates are its loudest and what they
    say should hold for all pictures.
    """
    fixed = settings.seed + index
    if settings.noise == "whole" or (settings.noise == "start" and step == 0):
        return Noise(fixed)
    drawn = derived_seed(settings.seed, step, 0, index)
    kept = settings.noise == "start" or (settings.noise == "turns" and step % 2 == 1)
    return Noise(fixed if kept else derived_seed(drawn), drawn)


def learning_rate(settings: Settings, step: int) -> float:
    """The rate of update `step`: it rises over `warmup` updates, as AdamW's first are its loudest
    and know the least; `decay` of it is lost, evenly, over the epochs."""
    risen = min((step + 1) / (settings.warmup + 1), 1.0)
    done = min(step, settings.epochs - 1) / settings.epochs
    return settings.learning_rate * risen * (1 - settings.decay * done)


def shown_noise(settings: Settings) -> list[Noise]:
    """The noise of the shown images: this seed first, then seeds that no update ever sees."""
    others = [derived_seed(settings.seed, 1, index) for index in range(1, settings.shown)]
    return [Noise(settings.seed), *(Noise(seed) for seed in others)]


def _show(
    model: DiffusionModel, settings: Settings
) -> Generator[Progress, None, tuple[Tensor, Trajectory | None]]:
    """The shown images, and the trajectory of this seed's if that is what is judged next.

    This seed's image is made alone, as a stock pipeline makes it: batches round differently.
    """
    own, *others = shown_noise(settings)
    prompt = settings.prompt
    mine = yield from rollout(model, [prompt], [own], settings, SHOWING)
    images = mine.images
    if others:
        rest = yield from rollout(model, [prompt] * len(others), others, settings, "held-out seeds")
        images = torch.cat([images, rest.images])
    shown = (images * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    return shown, mine if settings.noise == "whole" and settings.images == 1 else None


def _optimizer(
    parameters: Mapping[str, torch.nn.Parameter], settings: Settings, state: dict[str, Tensor]
) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, betas=(settings.momentum, 0.999),
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    for name, parameter in parameters.items() if state else ():
        optimizer.state[parameter] = {
            "step": state["step"].clone(),
            "exp_avg": state[f"exp_avg.{name}"].to(parameter.device, copy=True),
            "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(parameter.device, copy=True),
        }
    return optimizer


def _optimizer_state(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.AdamW
) -> dict[str, Tensor]:
    state = {}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]
        state["step"] = moments["step"].cpu().clone()
        state[f"exp_avg.{name}"] = moments["exp_avg"].cpu().clone()
        state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"].cpu().clone()
    return state


def save(session: Session, folder: Path) -> None:
    """Write the session into `folder`, so that `resume` goes on bit for bit, even after a crash.

    Each snapshot is a file of its own, written once; `run.json` names those that count and is
    replaced last, in one piece. Raises RunError when the disk refuses.
    """
    folder = Path(folder)
    try:
        (folder / "steps").mkdir(parents=True, exist_ok=True)
        files = []
        for number, snapshot in enumerate(session.history):
            files.append(f"steps/{number:04d}-{_digest(snapshot)}.safetensors")
            if not (folder / files[-1]).exists():
                write_whole(folder / files[-1], safetensors(*_packed(snapshot)))
        trajectory = None
        if session.trajectory is not None:
            trajectory = f"steps/{files[-1][6:-12]}-trajectory.safetensors"
            if not (folder / trajectory).exists():
                write_whole(folder / trajectory, safetensors(_flat(session.trajectory), {}))
        record = {
            "format": FORMAT,
            "settings": session.settings.as_dict(),
            "model": session.model_name,
            "steps": files,
            "trajectory": trajectory,
        }
        write_whole(folder / "run.json", json.dumps(record, indent=2).encode())
        for stale in {*(folder / "steps").iterdir()} - {
            folder / f for f in (*files, trajectory or "")
        }:
            stale.unlink()
    except OSError as error:
        raise RunError(
            f"the run cannot be saved in {str(folder)!r} ({error.strerror or error}); "
            "free some space or choose another folder. Nothing that was saved before is lost."
        ) from error


def resume(folder: Path) -> Session:
    """The session that `save` wrote into `folder`; RunError when there is none to be read."""
    folder = Path(folder)
    try:
        record = json.loads((folder / "run.json").read_text())
        if record["format"] != FORMAT:
            raise RunError(
                f"the run in {str(folder)!r} has format {record['format']}; "
                f"this version reads {FORMAT}."
            )
        history = tuple(_unpacked(folder / file) for file in record["steps"])
        trajectory = record["trajectory"] and _unflat(load_file(folder / record["trajectory"]))
        return Session(Settings(**record["settings"]), record["model"], history, trajectory)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise RunError(
            f"no run can be read from {str(folder)!r} ({type(error).__name__}: {error}); it must "
            "be a folder with a run.json and the steps it names."
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """All of `content` or nothing: into a temporary neighbour first, then renamed.

    The neighbour is closed by then, as Windows renames no open file, and made by `open`, so that it
    has ordinary permissions.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _digest(snapshot: Snapshot) -> str:
    """Tells this snapshot from another of the same number, made after going back."""
    digest = hashlib.sha256(json.dumps(snapshot.metrics).encode())
    for weight in snapshot.lora.weights.values():
        digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _packed(snapshot: Snapshot) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {"shown": snapshot.shown, "latent_reward": snapshot.latent_reward}
    tensors |= {f"lora.{name}": value for name, value in snapshot.lora.weights.items()}
    tensors |= {f"optimizer.{name}": value for name, value in snapshot.optimizer.items()}
    lora = {"rank": snapshot.lora.rank, "alpha": snapshot.lora.alpha}
    return tensors, {"metrics": json.dumps(snapshot.metrics), "lora": json.dumps(lora)}


def _unpacked(path: Path) -> Snapshot:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    def part(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    return Snapshot(
        Lora(**json.loads(metadata["lora"]), weights=part("lora.")),
        part("optimizer."), tensors["shown"], tensors["latent_reward"],
        json.loads(metadata["metrics"]),
    )  # fmt: skip


def _flat(trajectory: Trajectory) -> dict[str, Tensor]:
    tensors = {k: v for k, v in vars(trajectory).items() if isinstance(v, Tensor)}
    for part in ("cond", "uncond"):
        tensors |= {f"{part}.{k}": v for k, v in getattr(trajectory, part).items()}
    tensors |= {f"steps.{k}": v for k, v in vars(trajectory.steps).items()}
    tensors["guidance_scale"] = torch.tensor(trajectory.guidance_scale, dtype=torch.float64)
    return {name: value.contiguous() for name, value in tensors.items()}


def _unflat(tensors: dict[str, Tensor]) -> Trajectory:
    parts: dict[str, dict[str, Tensor]] = {"steps": {}, "cond": {}, "uncond": {}, "": {}}
    for name, value in tensors.items():
        part, _, rest = name.rpartition(".")
        parts[part][rest] = value
    guidance_scale = parts[""].pop("guidance_scale").item()
    return Trajectory(
        steps=Steps(**parts["steps"]), cond=parts["cond"], uncond=parts["uncond"],
        guidance_scale=guidance_scale, **parts[""],
    )  # fmt: skip
