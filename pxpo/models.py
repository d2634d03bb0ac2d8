"""A latent diffusion model, in the order of use: load, encode a prompt, predict noise, decode."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from .ddim import noise_from_velocity
from .embedded import TINY_WORLD
from .errors import ModelError, PxpoError, SettingError

logger = logging.getLogger(__name__)


def load_model(
    name: str | Path | None = None, *, device: str | None = None, dtype: torch.dtype | None = None
) -> DiffusionModel:
    """Load a Stable-Diffusion-1.x/2.x-shaped pipeline from a diffusers folder or the Hub.

    name: folder or Hub id; Tiny World when None. device and dtype choose themselves: CUDA with
    bfloat16 (float16 on older cards), else Apple's MPS or the CPU in float32. Only the UNet's
    matrix work is ever in half precision. Raises ModelError with the reason and the way out.
    """
    name = str(name or TINY_WORLD)
    device = device or best_device()
    dtype = dtype or best_dtype(device)
    try:
        pipeline = _half_if_there(
            name,
            dtype={"unet": dtype, "default": torch.float32},
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
            use_safetensors=True,
        )
        return DiffusionModel(pipeline, device, name)
    except PxpoError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            way_out = "use a smaller model or a card with more memory"
        elif Path(name).exists():
            way_out = "it must be a diffusers folder of a Stable Diffusion 1.x or 2.x pipeline"
        else:
            way_out = "check the name, the network, and your access to it if it is gated"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"The model {name!r} cannot be loaded ({reason}); {way_out}.") from error


def _half_if_there(name: str, **options: Any) -> StableDiffusionPipeline:
    """A half-precision UNet needs only the half-sized files, where the model has them."""
    if options["dtype"]["unet"] != torch.float32:
        with suppress(OSError, ValueError):
            return StableDiffusionPipeline.from_pretrained(name, variant="fp16", **options)
    return StableDiffusionPipeline.from_pretrained(name, **options)


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str) -> torch.dtype:
    if not device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


class DiffusionModel:
    """A frozen text-to-image model. Its own tensors never change; a LoRA comes and goes on `unet`.

    name: where it was loaded from. device: a torch device. latent_shape: (C, h, w).
    image_size: (H, W). alphas: (train steps,) the scheduler's cumulative products.
    busy: whether a LoRA is attached at the moment.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, device: str, name: str) -> None:
        config = pipeline.unet.config
        if config.in_channels != config.out_channels or config.addition_embed_type:
            raise ModelError(
                f"The UNet of {name!r} takes {config.in_channels} channels and gives "
                f"{config.out_channels}, or wants more than a prompt (inpainting, SDXL); "
                "choose a plain Stable Diffusion 1.x or 2.x model."
            )
        self.name = name
        self.busy = False  # whether somebody's LoRA is attached
        self.device = torch.device(device)
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder.requires_grad_(False).eval().to(device)
        self.unet = pipeline.unet.requires_grad_(False).eval().to(device)
        self.vae = pipeline.vae.requires_grad_(False).eval().to(device)
        # Only schedulers that can clip say whether they do; DDIM would take silence for a yes.
        self.scheduler = DDIMScheduler.from_config(
            {"clip_sample": False, **pipeline.scheduler.config}
        )
        self.prediction_type = self.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"The model {name!r} predicts {self.prediction_type!r}; "
                "only epsilon and v_prediction are known."
            )
        size = config.sample_size
        h, w = (size, size) if isinstance(size, int) else size
        self.latent_shape: tuple[int, int, int] = (config.in_channels, h, w)
        scale = pipeline.vae_scale_factor
        self.image_size: tuple[int, int] = (h * scale, w * scale)
        self.alphas: Tensor = self.scheduler.alphas_cumprod.float()
        big = self.device.type == "cuda"
        self._largest = {"sample": 64, "learn": 64 if big else 32, "decode": 8 if big else 16}

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of `prompt` that a model with a closed vocabulary (Tiny World) never learnt."""
        if not self.tokenizer.init_kwargs.get("closed_vocabulary"):
            return []
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", prompt.lower()))
        return [word for word in words if len(self.tokenizer.tokenize(word)) > 1]

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Text embeddings (B, L, D) float32 on the model's device, one per prompt."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(tokens.to(self.device)).last_hidden_state.float()

    def predict_noise(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor,
        uncond: Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """eps (B, C, h, w) float32; arguments as in `predict`."""
        output = self.predict(x_t, t, cond, uncond, guidance_scale)
        if self.prediction_type == "v_prediction":
            alpha = self.alphas[t.cpu()].view(-1, 1, 1, 1).to(self.device)
            return noise_from_velocity(output, x_t.to(self.device), alpha)
        return output

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor,
        uncond: Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The network's output (B, C, h, w) float32, with classifier-free guidance: the one call of
        the UNet. Noise or velocity, as `prediction_type` says.

        x_t: (B, C, h, w). t: (B,) training times. cond: (B, L, D). uncond: (1, L, D), needed
        unless guidance_scale is 1. Gradients flow through both halves.
        """
        guided = guidance_scale != 1.0
        x_t, t = x_t.to(self.device), t.to(self.device)
        inputs, times, context = x_t, t, cond
        if guided:
            if uncond is None:
                raise SettingError(f"guidance_scale is {guidance_scale} and needs `uncond`.")
            inputs, times = torch.cat([x_t, x_t]), torch.cat([t, t])
            context = torch.cat([uncond.expand_as(cond), cond])
        dtype = self.unet.conv_in.weight.dtype  # `unet.dtype` walks through the whole network
        output = self.unet(inputs.to(dtype), times, context.to(self.device, dtype)).sample.float()
        if guided:
            without, with_prompt = output.chunk(2)
            output = without + guidance_scale * (with_prompt - without)
        return output

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32 in [0, 1] on the CPU from latents (B, C, h, w)."""
        images: list[Tensor] = []

        def work(part: slice) -> None:
            z = latents[part].to(self.device) / self.vae.config.scaling_factor
            images.append((self.vae.decode(z).sample.float() / 2 + 0.5).clamp(0, 1).cpu())

        for _ in self.fold("decode", len(latents), work):
            pass
        return torch.cat(images)

    def fold(self, kind: str, count: int, work: Callable[[slice], None]) -> Iterator[int]:
        """Call `work` on consecutive slices of range(count), as large as memory has allowed so far.

        A slice that runs out of memory is halved and tried again, and the smaller size is
        remembered for this `kind` of work; so `work` must leave nothing behind when it fails.
        Yields the number done after each slice.
        """
        done = 0
        while done < count:
            size = min(self._largest[kind], count - done)
            try:
                work(slice(done, done + size))
                done += size
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise PxpoError(
                        f"Out of memory on {self.device} with a single image; close what else uses "
                        "it, or choose a smaller model."
                    ) from error
                self._largest[kind] = size // 2
                logger.warning("out of memory: going on with %d at a time", size // 2)
            else:
                yield done
                continue
            free_memory()  # only here has the exception let go of the tensors it held


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA says it by type; MPS and the CPU's allocator only in words."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def without_lora(model: DiffusionModel) -> Iterator[None]:
    """The base model for a while, though a LoRA is attached."""
    model.unet.disable_adapters()
    try:
        yield
    finally:
        model.unet.enable_adapters()
