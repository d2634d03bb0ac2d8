"""The wish: what a person meant by painting, as a reward on any picture.

A stroke means what was under it when it was drawn. Kept as a map it turns against the person: red
over a tree goes on blaming the meadow that came in its place. So a pixel of any picture gets the
mean of what was painted on those pixels of the painted pictures that look most like it, by the
diffusion model's own features, and by a segmenter's class probabilities where there is one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..credit import downsample
from ..errors import RewardError
from .segmentation import Segmenter

NEIGHBOURS = 16
SHARPNESS = 0.1  # a neighbour whose cosine is smaller by this counts by 1/e
LOUDER = 4.0  # a painted pixel counts as much as this many bare ones, or as many painted earlier
PROBABILITIES = 1.5  # their weight beside the features, which have length 1
LEFT = 0.001  # share of the pictures; a wish that leaves less than this blamed is met
FILLED = 0.9  # share of the pictures; where more is wanted, a wish that fills this is met
MET = "the wish is met on all pictures that are shown, and nothing more is to be learnt"
MOST_PAINTED = 16  # painted pictures of a wish: each is compared with all
AT_ONCE = 2**26  # likenesses of two pixels, in memory at the same time
REMEMBERED = 2**27  # bytes, of how the pictures look that were seen last


@dataclass(frozen=True)
class Painted:
    """picture: (H, W, 3) uint8, as it was shown. paint: (H', W') in [-2, 2], what was put on it;
    where it is given larger than the picture, it is made as small."""

    picture: Tensor
    paint: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "paint", shrunk(self.paint, self.picture.shape[:2]))


def shrunk(paint: Tensor, size: Sequence[int]) -> Tensor:
    """`paint` (H', W') of no more than this many rows and columns."""
    height, width = (min(one, most) for one, most in zip(paint.shape, size, strict=True))
    if paint.shape == (height, width):
        return paint
    means = downsample(paint[None], (height, width))[0]
    return means.clamp(paint.min(), paint.max())  # rounding would lead a hair beyond


def add_paint(painted: Sequence[Painted], picture: Tensor, paint: Tensor) -> tuple[Painted, ...]:
    """`painted` and one more; of two on the same picture, the later one's word on each pixel.

    Raises RewardError where that would be more than MOST_PAINTED pictures.
    """
    others, paint = [], shrunk(paint, picture.shape[:2])
    for one in painted:
        if torch.equal(one.picture, picture):
            before = F.interpolate(one.paint[None, None], paint.shape)[0, 0]
            paint = torch.where(paint != 0, paint, before)
        else:
            others.append(one)
    if len(others) >= MOST_PAINTED:
        raise RewardError(
            f"{len(others)} pictures are painted on, and a wish can have no more: paint on one of "
            "those, go on without new paint, or forget the wish and paint anew."
        )
    return (*others, Painted(picture, paint))


class Sight:
    """How pictures look to a diffusion model, and to a segmenter where there is one.

    It sees one picture at a time, so that what it says of one does not hang on the others, down to
    the last digit; and it remembers: each change of a wish judges anew what was shown before.
    """

    def __init__(
        self, features: Callable[[Tensor], Tensor], segmenter: Segmenter | None = None
    ) -> None:
        """features: images (B, 3, H, W) in [0, 1] to (B, F, h, w), as a DiffusionModel's."""
        self.features, self.segmenter = features, segmenter
        self._latest: dict[bytes, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, F, h, w) of images, and class probabilities (B, K, h, w); K may be 0."""
        features, probabilities = zip(*(self._remembered(image) for image in images), strict=True)
        return torch.cat(features), torch.cat(probabilities)

    def _remembered(self, image: Tensor) -> tuple[Tensor, Tensor]:
        values = repr(image.shape).encode() + image.contiguous().numpy().tobytes()
        key = hashlib.sha256(values).digest()
        look = self._latest.pop(key, None) or self._look(image[None])
        self._latest[key] = look  # the newest come last
        most = REMEMBERED // sum(part.nbytes for part in look)
        while len(self._latest) > max(most, 1):
            del self._latest[next(iter(self._latest))]
        return look

    def _look(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(image)
        h, w = features.shape[2:]
        if self.segmenter is None:
            return features, torch.zeros(1, 0, h, w)
        return features, downsample(self.segmenter.probabilities(image)[0], (h, w))[None]


class Wish:
    """A reward from painted pictures, the earliest first.

    What a later picture leaves bare means there what the earlier ones say of it; a picture that is
    painted first means nothing there. What a later one paints overrules the earlier ones on what
    looks like it, and on nothing else. So the latest word on a thing wins, and the others stay.
    """

    def __init__(self, painted: Sequence[Painted], sight: Sight) -> None:
        self.sight = sight
        pictures = torch.stack([one.picture for one in painted]).permute(0, 3, 1, 2) / 255
        features, probabilities = sight(pictures)
        self.size = (features.shape[-2], features.shape[-1])
        self.mean = features.mean((0, 2, 3), keepdim=True)
        self.std = features.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
        self.usual = probabilities.mean((0, 2, 3), keepdim=True)
        self.pixels = self._described(features, probabilities)  # (N, P, F)
        paint, share = (  # (N, P)
            torch.stack([downsample(part[None].float(), self.size).flatten() for part in parts])
            for parts in (
                [one.paint for one in painted], [one.paint != 0 for one in painted],
            )
        )  # fmt: skip
        loud = LOUDER * share + 1 - share  # a stroke that covers only a part is heard as well
        self.values = LOUDER * paint / loud  # (N, P): what is meant by each pixel
        self.loudness = loud.log()  # (N, P): the logarithm of how much it counts
        for number in range(1, len(painted)):
            bare = self._meant(self.pixels[number], number)
            self.values[number] += (1 - share[number]) * bare / loud[number]
            for earlier in range(number):
                self._overrule(earlier, number, share > 0)
        self.wants_more = any((one.paint > 0).any() for one in painted)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, H, W) in [-2, 2]."""
        described = self._described(*self.sight(images))
        maps = torch.stack([self._meant(pixels).view(self.size) for pixels in described])
        return F.interpolate(maps[:, None], images.shape[2:])[:, 0]

    def met(self, maps: Tensor) -> bool:
        """Whether these maps (B, H, W) of pictures leave nothing to learn: nothing is blamed, and
        where more of something is wanted, nine tenths are that."""
        praised, blamed = ((sign * maps >= 1).double().mean().item() for sign in (1, -1))
        return blamed < LEFT and (not self.wants_more or praised >= FILLED)

    def _described(self, features: Tensor, probabilities: Tensor) -> Tensor:
        """Each pixel's description (B, P, F), of length 1. A segmenter that calls all of the
        painted pictures the same has no say."""
        features = F.normalize((features - self.mean) / self.std, dim=1)
        both = torch.cat([features, PROBABILITIES * (probabilities - self.usual)], dim=1)
        return F.normalize(both.flatten(2), dim=1).transpose(1, 2)

    def _overrule(self, earlier: int, later: int, painted: Tensor) -> None:
        """Give what is painted on one picture the word of a later one, as far as it looks more like
        what is painted there. painted: (N, P), whether each pixel is."""
        own, new = painted[earlier], painted[later]
        pixels = torch.cat([self.pixels[earlier, own], self.pixels[later, new]])
        values = torch.cat([self.values[earlier, own], self.values[later, new]])
        louder = self.loudness[later, new] + math.log(LOUDER)
        loudness = torch.cat([self.loudness[earlier, own], louder])
        weights, like = _nearest(pixels[: own.sum()], pixels, loudness)
        weights = weights * (like >= own.sum())
        told = (weights * values[like]).sum(1)
        self.values[earlier, own] = (1 - weights.sum(1)) * values[: own.sum()] + told

    def _meant(self, pixels: Tensor, number: int | None = None) -> Tensor:
        """What pixels (P, F) mean by the first `number` painted pictures, or by all: (P,)."""
        memory, values, loudness = (
            part[:number].flatten(0, 1) for part in (self.pixels, self.values, self.loudness)
        )
        weights, like = _nearest(pixels, memory, loudness)
        return (weights * values[like]).sum(1)


def _nearest(pixels: Tensor, memory: Tensor, loudness: Tensor) -> tuple[Tensor, Tensor]:
    """Of pixels (P, F): which NEIGHBOURS of the memory (M, F) look most like each, (P, K), and how
    much each of these counts, 1 in all."""
    weights, indices = [], []
    for part in pixels.split(max(1, AT_ONCE // max(1, len(memory)))):
        scores = part @ memory.T / SHARPNESS + loudness
        nearest, index = scores.topk(min(NEIGHBOURS, len(memory)))
        weights.append(nearest.softmax(1))
        indices.append(index)
    return torch.cat(weights), torch.cat(indices)
