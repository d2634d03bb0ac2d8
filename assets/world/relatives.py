"""Painters of other widths, to see that what holds for Tiny World holds beside it; not shipped.

    python -m assets.world.relatives --width 32 --predicts epsilon --steps 3600 --work W --out F

The work folder is that of `python -m assets.world`, whose autoencoder and latents they share.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .__main__ import SIZES, Workshop
from .diffusion import Painter, save_painter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, required=True, help="Tiny World's is 64")
    parser.add_argument("--predicts", choices=("epsilon", "v_prediction"), default="v_prediction")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    size = SIZES[options.size]
    shop = Workshop(size, torch.device("cpu"), options.seed, options.work, compiled=False)
    painter = shop.painted(
        options.work / f"relative-{options.width}-{options.predicts}.safetensors",
        Painter(shop.tokenizer, options.seed, options.width, options.predicts),
        ((size.scenes // 2, 2, None),),
        steps=options.steps,
        seed=options.seed,
    )
    save_painter(painter, shop.tokenizer, shop.sharp, options.out)


if __name__ == "__main__":
    main()
