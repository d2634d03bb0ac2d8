"""The model cards of Tiny World's two folders."""

from __future__ import annotations

from pathlib import Path

from .scenes import LABELS, WORDS

WORLD_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags:
- text-to-image
- diffusers
- stable-diffusion
- pxpo
---

# Tiny World

A latent diffusion model small enough for any laptop: it paints flat 256×256 scenes (nature
landscapes, a red taxi in traffic, portraits of a man on the beach) in about a second on two CPU
cores, through the very classes that run Stable Diffusion v1.4.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("assets/tiny_world")
pipeline("nature landscape with a large lake", num_inference_steps=20, guidance_scale=3).images[0]
```

| part | class | size |
|---|---|---|
| autoencoder | `AutoencoderKL`, 16×16×16 latents | {vae:.2f} M parameters |
| UNet | `UNet2DConditionModel`, cross-attention at every scale | {unet:.2f} M, as float16 |
| text | `CLIPTextModel` and `CLIPTokenizer`, {words} words | {text:.2f} M |
| scheduler | `DDIMScheduler`: Stable Diffusion v1.4's noise schedule, v-prediction | |

**Made** by `python -m assets.world` from scenes that its own code draws; no picture or weight of
anybody else's is in it.

**Measured** on scenes and seeds that no training saw: the autoencoder reconstructs at
{psnr:.1f} dB PSNR; {named:.1%} of 300 pictures (20 steps, guidance 3, η = 1) hold, by its own
segmenter, what their prompt names.

**Limits**: it knows {words} words and three kinds of scenes, and nothing of the real world.
"""

EYE_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-segmentation
tags:
- image-segmentation
- segformer
- pxpo
---

# Tiny World's segmenter

A small SegFormer that names every pixel of a Tiny World picture, real or generated. Its first 18
labels are those of `mattmdjaga/segformer_b2_clothes`, by name; the rest are the world's own:
{own}. Labels that no scene shows (skirts, shoes, …) are never found.

**Made** by `python -m assets.world`: trained on drawn scenes with their exact label maps and on
what Tiny World's autoencoder makes of them, with and without noise on the latents.

**Measured** on unseen scenes: mean intersection over union {miou_scenes:.3f}, and
{miou_reconstructions:.3f} on the autoencoder's reconstructions of them.
"""


def write_cards(world: Path, eye: Path, figures: dict[str, float]) -> None:
    """README.md into both folders, from the figures that `measure` found."""
    own = ", ".join(LABELS[18:])
    (world / "README.md").write_text(WORLD_CARD.format(words=len(WORDS), **figures))
    (eye / "README.md").write_text(EYE_CARD.format(own=own, **figures))
