"""What a family of models must give to be taught here, and what all families share.

A family is a subclass of DiffusionModel: it loads and checks its pipeline, encodes prompts, makes
one call of its network, knows its steps, and decodes. Guidance is the same for all.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import SettingError
from ..settings import Sampling
from ..steps import Steps
from .memory import Folding

AnySampling = TypeVar("AnySampling", bound=Sampling)

Size = tuple[int | None, int | None]
"""Height and width of images in pixels; None is the model's own."""

Cond = dict[str, Tensor]
"""What the network is told besides x_t and t: tensors (B, ...) by the names the family gives."""


class DiffusionModel(Folding, ABC):
    """A frozen text-to-image model. Its own tensors never change; a LoRA comes and goes.

    name: where it was loaded from. device: a torch device. network: what is asked at each step, and
    what a LoRA changes; a module with diffusers' adapters. latent_shape: (C, h, w). image_size:
    (H, W). defaults: what settings that are left open become. words: all that it knows, of a model
    with a closed vocabulary. busy: whether a LoRA is attached at the moment. bare: whether it is
    switched off meanwhile.
    """

    name: str
    network: Any
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    defaults: Mapping[str, Any]
    words: tuple[str, ...] = ()

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.busy = self.bare = False
        self._encoded = functools.lru_cache(maxsize=32)(self.encode_one)

    @abstractmethod
    def encode_one(self, prompt: str) -> Cond:
        """What the network is told of a prompt, (1, ...) float32 on the CPU, where the text
        encoders stay: each prompt is encoded once, and a card has better use for its memory."""

    def encode(self, prompts: Sequence[str]) -> Cond:
        """What the network is told of each prompt, (B, ...) float32 on the CPU."""
        each = [self._encoded(prompt) for prompt in prompts]
        return {name: torch.cat([one[name] for one in each]) for name in each[0]}

    def unconditional(self) -> Cond:
        """What the network is told of no prompt, (1, ...) by name: guidance leads away from it."""
        return self.encode([""])

    @abstractmethod
    def call_network(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's output (B, C, h, w) float32: its one call. All is on the device."""

    @abstractmethod
    def steps(self, sampling: Sampling) -> Steps:
        """The steps of one sampling run; SettingError for more than the model has."""

    def take_step(
        self, at: Steps, x_t: Tensor, out: Tensor, z: Tensor, sampling: Sampling
    ) -> tuple[Tensor, Tensor]:
        """x_prev and the expected x_0, each (B, C, h, w), of one of the steps of `sampling`.

        A family may round as its stock pipeline does, so that this paints the same picture.
        """
        return at.mean(x_t, out) + at.sigma * z, at.expected_image(x_t, out)

    @abstractmethod
    def decode_some(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of latents (B, C, h, w) on the device."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """What the network, without a LoRA, makes of each latent pixel of images (B, 3, H, W) in
        [0, 1]: (B, F, h, w) float32 on the CPU. Pixels that show alike things have alike ones."""

    def filled(self, sampling: AnySampling) -> AnySampling:
        """`sampling`, or whole settings, with this model's own values where it is left open."""
        still_open = {
            name: value
            for name, value in self.defaults.items()
            if getattr(sampling, name, value) is None
        }
        return replace(sampling, **still_open)

    def unknown_words(self, prompt: str) -> list[str]:
        """What is written in `prompt` that a model with a closed vocabulary never learnt."""
        written = dict.fromkeys(re.findall(r"[\w'’]+|[^\w\s.,:;!?()\"-]+", prompt.lower()))
        return [word for word in written if word not in self.words] if self.words else []

    def unread(self, prompt: str) -> str:
        """The end of `prompt`, which is more than the model reads; mostly empty."""
        return ""

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        uncond: Cond | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The network's output (B, C, h, w) float32, with classifier-free guidance.

        x_t: (B, C, h, w). t: (B,) training times. uncond: that of no prompt, needed unless
        guidance_scale is 1. Gradients flow through both halves, which are one batched call.
        """
        x_t, t = x_t.to(self.device), t.to(self.device)
        cond = {name: value.to(self.device) for name, value in cond.items()}
        if guidance_scale == 1.0:
            return self.call_network(x_t, t, cond)
        if uncond is None:
            raise SettingError(f"guidance_scale is {guidance_scale} and needs `uncond`.")
        both = {
            name: torch.cat([uncond[name].to(self.device).expand_as(value), value])
            for name, value in cond.items()
        }
        out = self.call_network(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        without, with_prompt = out.chunk(2)
        return without + guidance_scale * (with_prompt - without)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32 in [0, 1] on the CPU from latents (B, C, h, w)."""

        def work(part: slice) -> Tensor:
            return self.decode_some(latents[part].to(self.device)).cpu()

        return torch.cat([images for _, images in self.fold("decode", len(latents), work)])


@contextmanager
def without_lora(model: DiffusionModel) -> Iterator[None]:
    """The base model for a while, though a LoRA is attached.

    Others may want it in the middle of that while: the LoRA comes back when the first one is done.
    """
    if model.bare:
        yield
        return
    model.bare = True
    model.network.disable_adapters()
    try:
        yield
    finally:
        model.network.enable_adapters()
        model.bare = False


def some(cond: Cond, chosen: slice | Tensor) -> Cond:
    """`cond` of some of its prompts."""
    return {name: value[chosen] for name, value in cond.items()}
