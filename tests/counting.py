"""Work and memory of Stable Diffusion on a card, counted: `python -m tests.counting`.

Nothing is loaded and nothing computed: the networks have their exact shapes on PyTorch's meta
device, where each operation only says how large its result is. With a GPU, `--device cuda` runs the
same on random weights, and measures. TFLOP: two for a multiplication and addition, attention
included. GB: 10^9 bytes at the peak, beside the weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pxpo.embedded import SINGLE_FILE
from pxpo.lora import TARGETS

A10G_PEAK, SHARE = 70e12, 1 / 3
"""Half-precision operations a second on paper, dense, and the part of it that is usual."""


@dataclass(frozen=True)
class Shape:
    """configs: the folder of its parts' configs. sides: of pictures, in pixels. encoders:
    parameters of its text encoders, in millions."""

    configs: Path
    sides: tuple[int, ...]
    encoders: int
    steps: int = 50


SHAPES = {
    "Stable Diffusion 1.4": Shape(SINGLE_FILE / "v1", (384, 512, 768), 123),
    "SDXL": Shape(SINGLE_FILE / "xl_base", (768, 1024, 1280), 818),
}


def shaped(kind: Any, config: Path) -> Any:
    """A network of diffusers in the shape that a folder's config says."""
    return kind.from_config(kind.load_config(config))


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """The kernel that a GPU takes; on the meta device PyTorch would count the plain one."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


class Peak(TorchDispatchMode):
    """Counts the bytes of what is alive at a time, beside the tensors that are `known`."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.bytes += storage.nbytes()
        if self.bytes > self.peak:  # only now is it worth looking for what has gone meanwhile
            self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
            self.bytes = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.bytes)
        return out


@dataclass(frozen=True)
class Cost:
    """seconds: None where nothing was computed."""

    tflop: float
    gb: float
    seconds: float | None = None


def cost(work: Callable[[], object], modules: Iterable[nn.Module], device: str) -> Cost:
    known = [one for module in modules for one in (*module.parameters(), *module.buffers())]
    if device == "meta":
        with FlopCounterMode(display=False) as flops:
            work()
        with Peak(known) as memory:
            work()
        return Cost(flops.get_total_flops() / 1e12, memory.peak / 1e9)
    with FlopCounterMode(display=False) as flops:
        work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    used, started = torch.cuda.memory_allocated(), time.perf_counter()
    work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return Cost(
        flops.get_total_flops() / 1e12, (torch.cuda.max_memory_allocated() - used) / 1e9, seconds
    )


class Counted:
    """The parts of one model, and what is asked of them."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        with torch.device(device):
            self.unet = UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(shape.configs / "unet")
            ).half()
            self.vae = AutoencoderKL.from_config(AutoencoderKL.load_config(shape.configs / "vae"))
            self.unet.requires_grad_(False).eval()
            self.vae.requires_grad_(False).eval()
            self.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=list(TARGETS)))
        self.lora = [one for one in self.unet.parameters() if one.requires_grad]
        for one in self.lora:
            one.data = one.data.float()

    @property
    def weights(self) -> float:
        """GB on the card: the UNet in half precision, its LoRA and the autoencoder in single."""
        parts = (*self.unet.parameters(), *self.vae.parameters())
        return sum(one.numel() * one.element_size() for one in parts) / 1e9

    def ask(self, side: int, count: int) -> Tensor:
        """The UNet's output for `count` latents."""
        half = {"dtype": torch.half, "device": self.device}
        more = {}
        if self.unet.config.addition_embed_type:
            ids = torch.zeros(count, 6, **half)
            more = {"text_embeds": torch.zeros(count, 1280, **half), "time_ids": ids}
        return self.unet(
            torch.zeros(count, 4, side // 8, side // 8, **half),
            torch.zeros(count, device=self.device),
            torch.zeros(count, 77, self.unet.config.cross_attention_dim, **half),
            added_cond_kwargs=more,
        ).sample

    @torch.no_grad()
    def sample(self, side: int) -> None:
        self.ask(side, 2)

    def learn(self, side: int, halves: int) -> None:
        """halves: of guidance that the gradient flows through."""
        torch.autograd.grad(self.ask(side, halves).float().sum(), self.lora)

    @torch.no_grad()
    def decode(self, side: int) -> None:
        self.vae.decode(torch.zeros(1, 4, side // 8, side // 8, device=self.device))

    def costs(self, side: int) -> dict[str, Cost]:
        parts: dict[str, Callable[[], object]] = {
            "sample a step": lambda: self.sample(side),
            "learn a pair, detached": lambda: self.learn(side, 1),
            "learn a pair, exact": lambda: self.learn(side, 2),
            "decode": lambda: self.decode(side),
        }
        modules = (self.unet, self.vae)
        found = {name: cost(work, modules, self.device) for name, work in parts.items()}
        self.unet.enable_gradient_checkpointing()
        for name in ("learn a pair, detached", "learn a pair, exact"):
            found[f"{name}, checkpoints"] = cost(parts[name], modules, self.device)
        self.unet.disable_gradient_checkpointing()
        return found


@contextmanager
def counting(device: str) -> Iterator[None]:
    """On the meta device, attention is counted as a GPU does it."""
    plain = F.scaled_dot_product_attention
    if device == "meta":
        F.scaled_dot_product_attention = fused_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def update_of(found: dict[str, Cost], steps: int, share: float, images: int, shown: int) -> float:
    """TFLOP of an update with hold: `images` pictures, the first known from before, and what is
    shown after it."""
    sample, learn = found["sample a step"].tflop, found["learn a pair, detached"].tflop
    pictures = (images - 1 + shown) * steps * sample
    return pictures + round(share * steps) * images * (learn + sample) + 16 * sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("meta", "cuda"), default="meta")
    parser.add_argument("--only", choices=SHAPES, help="one of them")
    options = parser.parse_args()
    rate = A10G_PEAK * SHARE / 1e12
    for name, shape in SHAPES.items():
        if options.only not in (None, name):
            continue
        model = Counted(shape, options.device)
        print(f"\n{name}: weights on the card {model.weights:.1f} GB; its text encoders, "
              f"{shape.encoders} M parameters, stay in the host's memory\n")  # fmt: skip
        print("| picture | part | TFLOP | GB | seconds |\n|---|---|---|---|---|")
        for side in shape.sides:
            with counting(options.device):
                found = model.costs(side)
            for part, one in found.items():
                seconds = f"{one.tflop / rate:.2f} *" if one.seconds is None else one.seconds
                print(f"| {side} | {part} | {one.tflop:.2f} | {one.gb:.2f} | {seconds} |")
            for share in (0.5, 0.25):
                whole = update_of(found, shape.steps, share, images=4, shown=3)
                print(f"| {side} | an update of the page, {share:.0%} of the steps | {whole:.0f} | "
                      f"| {whole / rate:.0f} * |")  # fmt: skip
    print(f"\n* on paper, at a third of an A10G's {A10G_PEAK / 1e12:.0f} TFLOP a second")


if __name__ == "__main__":
    main()
