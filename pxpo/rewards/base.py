"""What a reward is, and how a kind of reward is declared: once, in a file of its own.

The command line, the page, the API and the model card read the declarations; none of them knows a
kind by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..checks import TEXT, is_text
from ..embedded import ASSETS, TINY_WORLD
from ..errors import RewardError, SettingError

if TYPE_CHECKING:
    from .segmentation import Segmenter
    from .wish import Sight

Reward = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [0, 1] to reward maps (B, H, W)."""

LARGEST = 1e12
"""The most that a reward may be, so that its square can be added up over all pixels."""

Value = str | bool | tuple[str, ...]
Model = TypeVar("Model")


def resolved(name: str) -> str:
    """A folder's whole path, so that it is found from another folder as well; a Hub id as it is.

    Raises SettingError for a path that no run can keep, as it is no text.
    """
    if not name or not Path(name).exists() or Path(name).is_relative_to(ASSETS):
        return name
    path = str(Path(name).resolve())
    if not is_text(path):
        raise SettingError(
            f"the path {path!r} is no text in the system's encoding; give it another name, or, if "
            "it looks well elsewhere, set PYTHONUTF8=1."
        )
    return path


def checked_maps(maps: Any, count: int) -> Tensor:
    """The reward maps (B, H, W) of `count` images, of any real numbers, as float32 on the CPU.

    Raises RewardError where there are others, or fewer, or one that is not finite.
    """
    try:
        values = torch.as_tensor(maps).detach().cpu()
    except (RuntimeError, TypeError, ValueError) as error:
        raise RewardError(
            f"the reward maps are of the type {type(maps).__name__} ({error}); they must be a "
            "tensor (B, H, W)."
        ) from error
    if values.ndim != 3 or not values.numel() or values.is_complex():
        raise RewardError(
            f"the reward maps are {values.dtype} of the shape {tuple(values.shape)}; they must be "
            "real numbers (B, H, W)."
        )
    if len(values) != count:
        raise RewardError(f"there are {len(values)} reward maps for {count} images.")
    values = values.float()
    if not values.isfinite().all():
        image = int((~values.isfinite()).nonzero()[0, 0])
        raise RewardError(
            f"the reward map of image {image} has values that are not finite (NaN or infinite)."
        )
    if values.abs().max() > LARGEST:
        raise RewardError(
            f"the reward maps reach {values.abs().max():g}; the most they can be is {LARGEST:g}. "
            "Divide them: it is their differences that count."
        )
    return values


class Tools:
    """What a maker may need, handed to it: the device, and models, loaded when first used."""

    def __init__(
        self,
        device: str = "cpu",
        segmenter: Segmenter | None = None,
        usual: Mapping[str, str] | None = None,
        *,
        code: bool = False,
    ) -> None:
        """segmenter: the only one that may be used; any is loaded by its name when None.
        usual: the folder or Hub id for an option (its name) that a reward leaves empty.
        code: whether a Python file that a reward names may be run, as by the command line."""
        self.device, self.usual, self.code = device, dict(usual or {}), code
        self._only = segmenter
        self._loaded: dict[tuple[Any, str], Any] = {}
        self._sights: dict[tuple[Any, Any], Sight] = {}

    def load(self, make: Callable[[str, str], Model], name: str) -> Model:
        """The model that `make` makes of a name and the device; of each name once."""
        if (make, name) not in self._loaded:
            self._loaded[make, name] = make(name, self.device)
        return self._loaded[make, name]

    def segmenter(self, name: str = "") -> Segmenter:
        """The segmenter in this folder or of this Hub id; without a name the usual one."""
        from .segmentation import Segmenter

        if self._only is not None:
            if name not in ("", self._only.name):
                raise RewardError(
                    f"the segmenter is {name!r}, and here is only {self._only.name!r}; "
                    "leave it out."
                )
            return self._only
        return self.load(Segmenter, name)

    def beside(self, model_name: str, name: str = "") -> Segmenter | None:
        """The segmenter that knows the pictures of this model: the one named, or the only one, or
        for Tiny World its own; None for other models."""
        known = name or self._only is not None or Path(model_name) == TINY_WORLD
        return self.segmenter(name) if known else None

    def sight(self, features: Callable[[Tensor], Tensor], model_name: str, name: str = "") -> Sight:
        """How pictures look to a model, by its features, and to the segmenter beside it: of each
        pair the same one, which remembers."""
        from .wish import Sight

        pair = features, self.beside(model_name, name)
        return self._sights.setdefault(pair, Sight(*pair))


@dataclass(frozen=True)
class Option:
    """One option of a reward. Its type is its default's: text, yes or no, or several texts.

    choices: values to offer, or a function that asks the tools for them; others are not refused.
    path: a folder or a Hub id, which the command line asks for; the page and the API do not.
    """

    name: str
    default: Value
    help: str
    choices: Sequence[str] | Callable[[Tools], Sequence[str]] = ()
    path: bool = False

    def offered(self, tools: Tools) -> tuple[str, ...]:
        return tuple(self.choices(tools) if callable(self.choices) else self.choices)

    def checked(self, value: Any) -> Value:
        """`value` as the option's type, or a RewardError that names it."""
        if isinstance(self.default, tuple):
            if isinstance(value, list | tuple) and all(is_text(one) for one in value):
                return tuple(one.strip() for one in value)
            wanted = "a list of texts"
        elif isinstance(self.default, bool):
            if isinstance(value, bool):
                return value
            wanted = "true or false"
        else:
            if is_text(value):
                return value.strip()
            wanted = TEXT
        raise RewardError(f"{self.name} is {value!r}; it must be {wanted}.")


MORE = Option("more", False, "more of it instead of less")


def more_or_less(more: bool, what: str) -> str:
    return f"{'more' if more else 'less'} {what}"


@dataclass(frozen=True)
class RewardKind:
    """The declaration of a reward.

    name: for commands and files. title: of the page's tab. help: one line. words: the options to
    the name of the reward for people. make: the tools and the options to the Reward. experiment:
    whose settings (settings.EXPERIMENTS) it learns with. prompt: its own default one, if not that
    experiment's. by_hand: a person paints it; `make` is for what may paint in their stead.
    available: whether the page has it, as what it needs is on this machine. public: whether the
    page and the API may have it at all; else it is for the command line alone. recorded: options
    to what a run keeps of them, so that they mean the same elsewhere and later; whole paths when
    None.
    """

    name: str
    title: str
    help: str
    options: tuple[Option, ...]
    words: Callable[..., str]
    make: Callable[..., Reward]
    experiment: str = "color"
    prompt: str = ""
    by_hand: bool = False
    available: Callable[[Tools], bool] = lambda tools: True
    public: bool = True
    recorded: Callable[..., Mapping[str, Any]] | None = None


REWARDS: dict[str, RewardKind] = {}
"""Every kind by its name, in the order of the page's tabs; the package's __init__ lists them."""


@dataclass(frozen=True)
class RewardSpec:
    """A reward as plain data: its kind, and its options, the defaults filled in.

    Raises RewardError for a kind or an option that there is not.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in REWARDS:
            raise RewardError(
                f"there is no reward called {self.kind!r}; there are {', '.join(REWARDS)}."
            )
        options = {option.name: option for option in self.declared.options}
        if not isinstance(self.options, Mapping):
            raise RewardError(f"the reward's options are {self.options!r}; they go by their names.")
        if unknown := sorted(set(self.options) - set(options), key=repr):
            raise RewardError(
                f"the reward {self.kind!r} has no option {unknown[0]!r}; it has "
                f"{', '.join(options)}."
            )
        given = {n: o.checked(self.options.get(n, o.default)) for n, o in options.items()}
        object.__setattr__(self, "options", given)
        _ = self.name  # what cannot be put in words is refused

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self.options.items())))

    @property
    def declared(self) -> RewardKind:
        return REWARDS[self.kind]

    @property
    def name(self) -> str:
        """In words for people: "less blue", "painted"."""
        return self.declared.words(**self.options)

    @property
    def by_hand(self) -> bool:
        """Whether a person paints it, as no label is named that would be painted in their stead."""
        labels = (value for value in self.options.values() if isinstance(value, tuple))
        return self.declared.by_hand and not any(labels)

    @property
    def exact(self) -> bool:
        """Whether what a person paints is the reward of that picture alone, as in the paper."""
        return self.by_hand and bool(self.options.get("exact"))

    def make(self, tools: Tools | None = None) -> Reward:
        """The function from images to reward maps; RewardError where an option's value is wrong."""
        return self.declared.make(tools or Tools(), **self.options)

    def recorded(self) -> RewardSpec:
        """The same, as a run keeps it: with whole paths, so that it means the same elsewhere."""
        if self.declared.recorded:
            return RewardSpec(self.kind, self.declared.recorded(**self.options))
        folders = [option.name for option in self.declared.options if option.path]
        return self.changed(**{name: resolved(self.options[name]) for name in folders})

    def changed(self, **options: Any) -> RewardSpec:
        return RewardSpec(self.kind, {**self.options, **options})

    def as_dict(self) -> dict[str, Any]:
        """Plain data: RewardSpec(**this) is the spec again, also by way of JSON."""
        return {"kind": self.kind, "options": dict(self.options)}
