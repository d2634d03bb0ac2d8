"""Whatever comes in is kept whole or refused in one clear line, and nobody else notices.

A table for each kind of input: what is done to a good one, and words that the refusal must hold.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_lora
from PIL import Image
from safetensors.torch import load, save
from test_lora_files import diffusers, in_unet, kohya, plain
from test_studio import BLUE, PAINT, SMALL, paint, same

from pxpo import RewardSpec, Run, finish, generate, learn, load_lora, load_model
from pxpo.errors import PxpoError, RewardError, RunError, SettingError
from pxpo.rewards import open_picture
from pxpo.rewards.wish import MOST_PAINTED
from pxpo.store import open_run
from pxpo.studio import MOST_UPDATES, Studio

SECRET = "a secret place"  # in the way to all of the server's folders


@pytest.fixture(scope="module")
def studio(model_folder, segmenter, tmp_path_factory) -> Studio:
    folder = tmp_path_factory.mktemp("server") / SECRET / "runs"
    return Studio(load_model(model_folder, device="cpu"), segmenter, folder)


@pytest.fixture(scope="module")
def run(studio) -> Run:
    """A person's, with an update by paint and one by a rule."""
    run = finish(studio.start(**SMALL))
    finish(studio.step(run.id, PAINT, paint()))
    return finish(studio.step(run.id, BLUE, images=2))


@pytest.fixture(scope="module")
def good(studio, run) -> dict[str, bytes]:
    """The files of that run, by their names."""
    with zipfile.ZipFile(studio.archive(run.id)) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


@pytest.fixture(autouse=True)
def unharmed(studio, run) -> Iterator[None]:
    """The other person's run is as it was, the model free, and nothing is left behind."""
    before = {*studio.folder.rglob("*")}
    yield
    left = {*studio.folder.rglob("*")} - before
    for folder in left & {*studio.folder.iterdir()}:
        shutil.rmtree(folder)
    assert not left
    assert studio.run(run.id) is run and not studio.model.busy
    assert studio.heat(run, BLUE).size == (16, 16)


def refused(work: Callable[[], Any], words: str, *kinds: type[PxpoError]) -> None:
    """`work` ends in one line that holds all of the `words`, fit for a visitor."""
    with pytest.raises(kinds or PxpoError) as refusal:
        work()
    message = refusal.value.for_visitors()
    assert all(word in message for word in words.split(" & ")), message
    assert "\n" not in message and len(message) <= 1000
    assert SECRET not in message and "/tmp" not in message and "runs/" not in message, message


def table(**kinds: dict[str, Any]) -> Any:
    """Parametrize by the cases of one or several kinds."""
    cases = [(f"{kind}: {name}", case) for kind in kinds for name, case in kinds[kind].items()]
    return pytest.mark.parametrize("case", [c for _, c in cases], ids=[name for name, _ in cases])


# A run in a zip


def zipped(files: dict[str, bytes], **options: Any) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", **{"compression": zipfile.ZIP_DEFLATED, **options}) as pack:
        for name, file in files.items():
            pack.writestr(name, file)
    return content.getvalue()


def first_update(files: dict[str, bytes]) -> str:
    return json.loads(files["run.json"])["updates"][1]["file"]


def patched(content: bytes, local: int, central: int, value: bytes) -> bytes:
    """A zip with `value` at these offsets of every local and central header."""
    changed = bytearray(content)
    for signature, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
        at = content.find(signature)
        while at >= 0:
            changed[at + offset : at + offset + len(value)] = value
            at = content.find(signature, at + 4)
    return bytes(changed)


def scrambled(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """With other bytes in the middle of an update as it is packed."""
    content = zipped(files, compression=compression)
    middle = content.index(first_update(files).encode()) + 500
    return content[:middle] + bytes(range(64)) + content[middle + 64 :]


NO_RUN, NO_JSON = "no run can be read", "run.json is not in the zip"
ZIPS: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "text": (lambda files: b"not a zip", "not a zip"),
    "empty file": (lambda files: b"", NO_RUN),
    "no files": (lambda files: zipped({}), NO_JSON),
    "other files": (lambda files: zipped({"hello.txt": b"hello"}), NO_JSON),
    "run.json in a folder": (
        lambda files: zipped({f"run/{name}": file for name, file in files.items()}), NO_JSON,
    ),
    "run.json is a folder": (lambda files: zipped({"run.json/": b""}), NO_JSON),
    "cut off": (lambda files: zipped(files)[:-400], NO_RUN),
    "only its end": (lambda files: zipped(files)[-400:], NO_RUN),
    "scrambled": (scrambled, NO_RUN),
    "scrambled, lzma": (lambda files: scrambled(files, zipfile.ZIP_LZMA), NO_RUN),
    "scrambled, bzip2": (lambda files: scrambled(files, zipfile.ZIP_BZIP2), NO_RUN),
    "encrypted": (lambda files: patched(zipped(files), 6, 8, b"\1\0"), "encrypted"),
    "unknown compression": (lambda files: patched(zipped(files), 8, 10, b"\x63\0"), NO_RUN),
    "wrong checksum": (lambda files: patched(zipped(files), 14, 16, b"abcd"), NO_RUN),
    "smaller than it says": (
        lambda files: patched(zipped(files), 22, 24, b"\xff\xff\0\0"), NO_RUN,
    ),
    "larger than it says": (lambda files: patched(zipped(files), 22, 24, b"\5\0\0\0"), NO_RUN),
    "places beyond its end": (
        lambda files: patched(zipped(files), 22, 42, b"\xff\xff\xff\x7f"), NO_RUN,
    ),
    "an update is missing": (
        lambda files: zipped({n: f for n, f in files.items() if n != first_update(files)}),
        "updates/0001 & not in the zip",
    ),
    "run.json of 20 MB": (
        lambda files: zipped({**files, "run.json": b" " * 20_000_000 + files["run.json"]}),
        "run.json & 17 MB & the most",
    ),
    "an update of 300 MB": (
        lambda files: zipped({**files, first_update(files): bytes(300_000_000)}, compresslevel=1),
        "GB & the most",
    ),
    "an update that is text": (
        lambda files: zipped({**files, first_update(files): b"not tensors"}), "updates/0001",
    ),
    "an update that is empty": (
        lambda files: zipped({**files, first_update(files): b""}), "updates/0001",
    ),
    "an update that is cut off": (
        lambda files: zipped({**files, first_update(files): files[first_update(files)][:-9]}),
        "updates/0001",
    ),
    "an update whose head is deep": (
        lambda files: zipped({
            **files,
            first_update(files): struct.pack("<Q", 200_000) + b"[" * 200_000,
        }),
        "updates/0001",
    ),
    "run.json empty": (lambda files: zipped({**files, "run.json": b""}), "run.json"),
    "run.json of other letters": (
        lambda files: zipped({**files, "run.json": "\ufeff{}".encode("utf-16")}), "run.json",
    ),
    "run.json cut off": (
        lambda files: zipped({**files, "run.json": files["run.json"][:-20]}), "run.json",
    ),
    "run.json deep": (
        lambda files: zipped({**files, "run.json": b'{"format":' + b"[" * 100_000}), "run.json",
    ),
    **{
        f"run.json is {text}": (
            lambda files, text=text: zipped({**files, "run.json": text.encode()}), "run.json",
        )
        for text in ("null", "[]", "{}", "7", '"run"', "true", "NaN", '{"format": 5}')
    },
}  # fmt: skip


def admitted(studio: Studio, folder: Path, content: bytes) -> Run:
    folder = folder / SECRET
    folder.mkdir()
    (folder / "upload.zip").write_bytes(content)
    return studio.admit(folder / "upload.zip")


def refused_everywhere(studio: Studio, folder: Path, content: bytes, words: str) -> None:
    """On the page; and the command line, which has no model to compare with yet, is as clear."""
    refused(lambda: admitted(studio, folder, content), words)
    try:
        open_run(folder / SECRET / "upload.zip")
    except PxpoError as error:
        assert "\n" not in str(error)
    else:
        assert "here" in words


@table(zip=ZIPS)
def test_a_zip_that_is_no_run_is_refused(studio, good, tmp_path, monkeypatch, case):
    make, words = case
    monkeypatch.setattr(studio, "most_bytes", 4e8)
    refused_everywhere(studio, tmp_path, make(good), words)


# Its run.json

Record = dict[str, Any]


def place(record: Record, path: str) -> tuple[Any, Any]:
    """What holds the entry at a path such as updates.1.lora.rank, and its name there."""
    *way, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in way:
        record = record[part]
    return record, last


def to(path: str, value: Any) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        holder, name = place(record, path)
        holder[name] = value

    return change


def without(path: str) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        holder, name = place(record, path)
        del holder[name]

    return change


WHOLE, NUMBER, TEXT, OBJECT, LIST = "whole", "number", "text", "object", "list"
ENTRIES = {
    "format": [WHOLE], "model": [TEXT, None], "settings": [OBJECT], "reward": [OBJECT, None],
    "paint": [TEXT, None], "updates": [LIST], "later": [WHOLE],
    "updates.0": [OBJECT], "updates.1": [OBJECT], "updates.1.file": [TEXT],
    "updates.1.lora": [OBJECT], "updates.1.lora.rank": [WHOLE],
    "updates.1.lora.alpha": [WHOLE, NUMBER], "updates.1.reward": [OBJECT, None],
    "updates.1.reward.kind": [TEXT], "updates.1.reward.options": [OBJECT],
    "updates.1.reward.options.segmenter": [TEXT], "updates.1.settings": [OBJECT],
    "updates.1.settings.images": [WHOLE, NUMBER], "updates.1.settings.steps": [WHOLE],
    "updates.1.settings.seed": [WHOLE], "updates.1.settings.blur": [WHOLE, NUMBER],
    "updates.1.settings.prompt": [TEXT], "updates.1.settings.noise": [],
    "updates.1.metrics": [OBJECT], "updates.1.metrics.moved": [WHOLE, NUMBER],
    "updates.1.scores": [OBJECT], "updates.1.scores.painted": [],
    "updates.1.scores.painted.here": [WHOLE, NUMBER],
    "updates.1.scores.painted.held_out": [WHOLE, NUMBER, None],
}  # fmt: skip
"""Entries of a run.json, and what they may be."""

OTHERS = {None: None, WHOLE: 3, NUMBER: 0.5, TEXT: "x", OBJECT: {"x": 1}, LIST: [1], True: True}

ODD = {
    f"{path} is {json.dumps(OTHERS[kind])}": (to(path, OTHERS[kind]), path.split(".")[-1])
    for path, may_be in ENTRIES.items()
    for kind in OTHERS
    if kind not in may_be and not (kind == NUMBER and path.endswith("images"))
}
MISSING = {
    f"without {path}": (without(path), path.split(".")[-1])
    for path in (
        "format", "model", "settings", "reward", "paint", "updates", "later", "updates.1.file",
        "updates.1.lora", "updates.1.lora.rank", "updates.1.lora.alpha", "updates.1.reward.kind",
        "updates.1.settings", "updates.1.metrics", "updates.1.scores",
        "updates.1.scores.painted.here", "updates.1.settings.images", "settings.steps",
    )
}  # fmt: skip

LONG = "very " * 100_000
RECORDS: dict[str, tuple[Callable[[Record], Any], str]] = {
    "another format": (to("format", 3), "format 3"),
    "no updates": (to("updates", []), "updates"),
    "more later updates than there are": (to("later", 3), "later is 3 & 2"),
    "fewer later updates than none": (to("later", -1), "later"),
    "one update twice": (
        lambda record: record["updates"].append(record["updates"][1]), "updates/0001 & twice",
    ),
    "more updates than there may be": (
        lambda record: record["updates"].extend(
            {**record["updates"][1], "file": f"updates/{n:04d}-x.safetensors"} for n in range(99)
        ),
        f"101 updates & here & {MOST_UPDATES}",
    ),
    "a million updates": (to("updates", [0] * 1_000_000), "updates"),
    "a hundred thousand metrics": (
        to("updates.1.metrics", {f"x{n}": None for n in range(100_000)}), "100000 entries",
    ),
    "a file outside": (to("updates.1.file", "../../outside.safetensors"), "updates.1.file"),
    "a file of the server": (to("updates.1.file", "/etc/passwd"), "updates.1.file"),
    "a file outside, in the middle": (
        to("updates.1.file", "updates/../../outside.safetensors"), "updates.1.file",
    ),
    "a file outside, on Windows": (to("updates.1.file", "updates\\..\\x.safetensors"), "file"),
    "a file's name with a zero": (to("updates.1.file", "updates/\0.safetensors"), "updates.1.file"),
    "a file's name with a line's end": (to("updates.1.file", "updates/0.safetensors\n"), "file"),
    "a file's name that is long": (to("updates.1.file", f"updates/{LONG}.safetensors"), "file"),
    "paint outside": (to("paint", "../paint.safetensors"), "paint"),
    "paint that is an update": (
        lambda record: to("paint", record["updates"][1]["file"])(record), "updates/0001 & twice",
    ),
    "paint that is run.json": (to("paint", "run.json"), "paint"),
    "a model elsewhere": (to("model", "somebody/else"), "here"),
    "a model that is the server's folder": (to("model", "/etc"), "here"),
    "a model whose name is long": (to("model", LONG), "here"),
    "a wish of an unknown kind": (to("reward", {"kind": "poetry"}), "no reward called 'poetry'"),
    "an unknown kind of an update": (
        to("updates.1.reward", {"kind": "poetry", "options": {}}), "updates.1 & 'poetry'",
    ),
    "an option that there is not": (
        to("updates.1.reward", {"kind": "color", "options": {"x": 1}}), "no option 'x'",
    ),
    "an option of the wrong type": (
        to("updates.1.reward", {"kind": "color", "options": {"color": 3}}), "color is 3",
    ),
    "an option that is deep": (
        to("updates.1.reward", {"kind": "color", "options": {"color": [[[[[[]]]]]]}}), "color is",
    ),
    "code of one's own that is nowhere": (
        to("updates.1.reward", {"kind": "own", "options": {"reward": "os.system"}}), "os.system",
    ),
    "a mix of itself": (
        to("reward", {"kind": "mix", "options": {"part": ["1 mix"]}}), "a mix is of other rewards",
    ),
    "a setting that there is not": (to("updates.1.settings.x", 1), "settings.x"),
    "a score that there is not": (to("updates.1.scores.painted.x", 1), "painted.x"),
    "an entry that there is not": (to("updates.1.x", 1), "updates.1.x"),
    "a rank of its own": (to("updates.1.lora.rank", 3), "rank is 3 & 2"),
    "a rank that is too large": (to("updates.1.lora.rank", 10**7), "rank is 10000000"),
    "a rank that is 0": (to("updates.1.lora.rank", 0), "rank"),
    "an alpha that is 0": (to("updates.1.lora.alpha", 0), "alpha"),
    "an alpha that is below 0": (to("updates.1.lora.alpha", -2.0), "alpha"),
    "an alpha that is no number": (to("updates.1.lora.alpha", float("nan")), "alpha"),
    "an alpha without end": (to("updates.1.lora.alpha", float("inf")), "alpha"),
    "settings of another rank": (to("updates.1.settings.rank", 5), "rank"),
    "no steps": (to("updates.1.settings.steps", 0), "steps is 0"),
    "open steps": (to("settings.steps", None), "steps"),
    "more steps than the model has": (
        lambda record: [to(f"{one}.steps", 1001)(record) for one in ("settings",)], "steps & 1000",
    ),
    "a seed without end": (to("settings.seed", 10**400), "seed"),
    "a seed below 0": (to("settings.seed", -1), "seed"),
    "a strength that is no number": (to("settings.strength", float("nan")), "strength"),
    "no images": (to("updates.1.settings.images", 0), "images"),
    "one image, compared": (to("settings.images", 1), "baseline"),
    "other pictures than are shown": (to("updates.1.settings.shown", 2), "shown"),
    "other images than were judged": (to("updates.1.settings.images", 3), "latent_reward"),
    "a prompt that is no text": (to("settings.prompt", "a\udc80"), "surrogate"),
    "a prompt that is long": (to("settings.prompt", LONG), "prompt"),
    "a metric that is no number": (to("updates.1.metrics.moved", float("nan")), "moved"),
    "a metric without end": (to("updates.1.metrics.moved", float("-inf")), "moved"),
    "a score that is no number": (to("updates.1.scores.painted.here", float("nan")), "here"),
    "a score larger than a float": (to("updates.1.scores.painted.here", 10**400), "here"),
}  # fmt: skip


@table(record=RECORDS, odd=ODD, missing=MISSING)
def test_a_record_that_cannot_be_is_refused(studio, good, tmp_path, case):
    change, words = case
    record = json.loads(good["run.json"])
    change(record)
    content = zipped({**good, "run.json": json.dumps(record).encode()}, compresslevel=1)
    refused_everywhere(studio, tmp_path, content, words)


# Its tensors

SPOILT: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda tensor: None,
    "half": lambda tensor: tensor.half(),
    "whole numbers": lambda tensor: tensor.long(),
    "one axis more": lambda tensor: tensor[None],
    "one row more": lambda tensor: torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor[None],
    "nothing": lambda tensor: tensor.flatten()[:0],
    "a number": lambda tensor: tensor.flatten()[:3].sum()[None, None],
}
NOT_FINITE: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "one NaN": lambda tensor: torch.where(torch.arange(tensor.numel()) == 0, torch.nan,
                                          tensor.flatten()).view(tensor.shape),
    "infinite": lambda tensor: tensor / 0,
}  # fmt: skip

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLOATS = [
    "latent_reward", f"lora.{LAYER}.lora_A.default.weight", f"lora.{LAYER}.lora_B.default.weight",
    "optimizer.step", f"optimizer.exp_avg.{LAYER}.lora_A.default.weight",
    f"optimizer.exp_avg_sq.{LAYER}.lora_B.default.weight",
]  # fmt: skip

Tensors = dict[str, torch.Tensor]


def spoilt(name: str, how: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    def change(tensors: Tensors) -> None:
        tensor = how(tensors.pop(name))
        if tensor is not None:
            tensors[name] = tensor.contiguous()

    return change


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def only(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        kept = {k: v for k, v in tensors.items() if k.startswith(names)}
        tensors.clear()
        tensors.update(kept)

    return change


TENSORS = {
    **{
        f"{name} is {kind}": (spoilt(name, how), name.rpartition(".lora_")[0] or name)
        for name, kinds in [("shown", SPOILT), *((one, SPOILT | NOT_FINITE) for one in FLOATS)]
        for kind, how in kinds.items()
    },
    "one too many": (lambda tensors: tensors.update(x=torch.zeros(1)), "'x'"),
    "a layer too many": (
        lambda tensors: tensors.update({
            "lora.x.to_q.lora_A.default.weight": torch.zeros(2, 4),
            "lora.x.to_q.lora_B.default.weight": torch.zeros(4, 2),
        }),
        "x.to_q",
    ),
    "a layer of another name": (
        renamed(FLOATS[1], "lora.../../x.lora_A.default.weight"), "lora",
    ),
    "no LoRA": (only("shown", "latent_reward"), "lora"),
    "half an optimizer": (only("shown", "latent_reward", "lora", "optimizer.step"), "exp_avg"),
    "nothing at all": (only("none"), "latent_reward & left out"),
    "moments below 0": (spoilt(FLOATS[-1], lambda t: -t - 1), "exp_avg_sq"),
    "an optimizer before its first step": (
        spoilt("optimizer.step", lambda t: t * 0 - 1), "optimizer.step",
    ),
    "pictures of another size": (spoilt("shown", lambda t: t[:, :8, :8]), "shown"),
}  # fmt: skip


def with_update(files: dict[str, bytes], number: int, change: Callable[[Tensors], Any]) -> bytes:
    name = json.loads(files["run.json"])["updates"][number]["file"]
    tensors = load(files[name])
    change(tensors)
    return zipped({**files, name: save(tensors)}, compresslevel=1)


@table(tensors=TENSORS)
@pytest.mark.parametrize("number", [1, 2])
def test_an_update_that_cannot_be_is_refused(studio, good, tmp_path, number, case):
    change, words = case
    refused_everywhere(
        studio, tmp_path, with_update(good, number, change), f"updates/{number:04d} & {words}"
    )


def test_a_run_of_another_size_than_here_is_refused(studio, good, tmp_path):
    """All of it fits together, but not the model."""
    files = dict(good)
    for name in files:
        if name.startswith("updates/0"):
            tensors = load(files[name])
            tensors["latent_reward"] = tensors["latent_reward"][:, :4, :4].contiguous()
            files[name] = save(tensors)
    refused_everywhere(studio, tmp_path, zipped(files), "here & latent")


# Its paint


def extended(count: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({
        f"{kind}.{n:06d}": tensors[f"{kind}.000000"].clone()
        for kind in ("map", "picture") for n in range(count)
    })  # fmt: skip


PAINTED = {
    **{
        f"{name} is {kind}": (spoilt(f"{name}.000000", how), f"{name}.000000")
        for name, kinds in (("map", SPOILT | NOT_FINITE), ("picture", SPOILT))
        for kind, how in kinds.items()
        if (name, kind) not in (("map", "one row more"), ("map", "a number"))
    },
    "map beyond 2": (spoilt("map.000000", lambda t: t + 0.5), "map.000000 & 2"),
    "map of 3000 pixels": (
        spoilt("map.000000", lambda t: torch.zeros(3000, 3000)), "map.000000 & 3000",
    ),
    "one too many": (lambda tensors: tensors.update(x=torch.zeros(1)), "'x'"),
    "numbers with a gap": (renamed("map.000000", "map.000003"), "map"),
    "another number's form": (renamed("map.000000", "map.0"), "map"),
    "none": (only("none"), "paint"),
    "more than there may be": (extended(MOST_PAINTED + 1), f"17 & {MOST_PAINTED}"),
}  # fmt: skip


@table(paint=PAINTED)
def test_paint_of_a_run_that_cannot_be_is_refused(studio, good, tmp_path, case):
    change, words = case
    name = json.loads(good["run.json"])["paint"]
    tensors = load(good[name])
    change(tensors)
    content = zipped({**good, name: save(tensors)}, compresslevel=1)
    refused_everywhere(studio, tmp_path, content, f"paint & {words}")


# What is harmless is taken


@pytest.mark.parametrize(
    "more",
    [
        {"notes.txt": b"hello"},
        {"../../outside": b"x", "/outside": b"x", "updates/../../x.safetensors": b"x"},
        {f"updates/{n}.safetensors": b"x" for n in range(2000)},
        {"updates/other.safetensors": bytes(500_000_000)},
        {"lora/run.json": b"{}", "RUN.JSON": b"{}"},
    ],
    ids=["notes", "paths outside", "two thousand updates", "half a gigabyte", "other run.jsons"],
)  # fmt: skip
def test_only_what_a_run_names_is_unpacked(studio, run, good, tmp_path, monkeypatch, more):
    monkeypatch.setattr(studio, "most_bytes", 4e8)
    kept = admitted(studio, tmp_path, zipped({**more, **good}, compresslevel=1))
    folder = studio.folder / kept.id
    named = {"run.json", *(name for name in good if name.startswith("updates/"))}
    assert {f.relative_to(folder).as_posix() for f in folder.rglob("*.*")} == named
    assert same(kept, run) and not list(tmp_path.parent.rglob("outside"))
    forgotten(studio, kept)


def forgotten(studio: Studio, run: Run) -> None:
    studio.forget(run.id)
    for file in sorted((studio.folder / run.id).rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (studio.folder / run.id).rmdir()


# LoRA files

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def pair(a: torch.Tensor, b: torch.Tensor, name: str = Q) -> Tensors:
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def with_first(state: Tensors, how: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    first = next(iter(state))
    return save({**state, first: how(state[first]).contiguous()})


def config(text: str) -> Callable[[Any], bytes]:
    return lambda model: save(in_unet(plain(model)), {"lora_adapter_metadata": text})


def head(text: bytes, rest: bytes = b"") -> Callable[[Any], bytes]:
    """A safetensors file with this for its head."""
    return lambda model: struct.pack("<Q", len(text)) + text + rest


LORAS: dict[str, tuple[Callable[[Any], bytes], str]] = {
    "empty": (lambda model: b"", "No LoRA can be read"),
    "text": (lambda model: b"not a LoRA", "No LoRA can be read"),
    "a pickle": (lambda model: b"\x80\x04\x95\x0c\0\0\0\0\0\0\0\x8c\x05hello\x94.", "No LoRA"),
    "cut off": (lambda model: save(in_unet(plain(model)))[:-100], "No LoRA can be read"),
    "a head of an exabyte": (lambda model: b"\xff" * 8 + b"{}", "No LoRA can be read"),
    "a head that is no JSON": (head(b"{"), "No LoRA can be read"),
    "a head that is deep": (head(b'{"x":' + b"[" * 100_000), "No LoRA can be read"),
    "tensors beyond the end": (
        head(b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'), "No LoRA can be read",
    ),
    "tensors of a negative size": (
        head(b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"), "No LoRA",
    ),
    "a size beyond counting": (
        head(b'{"x":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],'
             b'"data_offsets":[0,4]}}', b"1234"), "No LoRA can be read",
    ),
    "an unknown type": (
        head(b'{"x":{"dtype":"F13","shape":[1],"data_offsets":[0,4]}}', b"1234"), "No LoRA",
    ),
    "no tensors": (lambda model: save({}), "no LoRA in it"),
    "metadata that is cut off": (config("{"), "lora_adapter_metadata is damaged"),
    "metadata that is a list": (config("[]"), "lora_adapter_metadata is damaged"),
    "metadata that is deep": (config("[" * 100_000), "lora_adapter_metadata is damaged"),
    "metadata that is deep in a name": (
        config('{"r":' + '{"r":' * 100_000 + "}" * 100_001), "lora_adapter_metadata is damaged",
    ),
    "an alpha that is a list": (config('{"lora_alpha": [1]}'), "damaged"),
    "an alpha that is text": (config('{"lora_alpha": "x"}'), "damaged"),
    "an alpha that is null": (config('{"lora_alpha": null}'), "damaged"),
    "an alpha that is no number": (config('{"lora_alpha": NaN}'), "alpha & positive"),
    "an alpha without end": (config('{"lora_alpha": 1e999}'), "alpha & positive"),
    "an alpha that is 0": (config('{"lora_alpha": 0}'), "alpha & positive"),
    "an alpha that is below 0": (config('{"lora_alpha": -3}'), "alpha & positive"),
    "an alpha with a thousand digits": (config(f'{{"lora_alpha": 1{"0" * 1000}}}'), "damaged"),
    "alphas that are a list": (config('{"alpha_pattern": [1]}'), "damaged"),
    "alphas that are text": (config('{"alpha_pattern": {"to_q": "x"}}'), "damaged"),
    "alphas of a slow pattern": (config('{"alpha_pattern": {"(a+)+": 1}}'), "not the name"),
    "alphas that are no numbers": (config('{"alpha_pattern": {"to_q": NaN}}'), "alpha & positive"),
    "an unknown kind": (config('{"peft_type": {"x": []}}'), "peft_type"),
    "a way to begin that changes the base": (config('{"init_lora_weights": [1]}'), "init_lora"),
    "a scalar for a matrix": (
        lambda model: with_first(in_unet(plain(model)), lambda w: w[0, 0]), "must be a matrix",
    ),
    "a vector for a matrix": (
        lambda model: with_first(in_unet(plain(model)), lambda w: w[0]), "must be a matrix",
    ),
    "whole numbers": (
        lambda model: with_first(in_unet(plain(model)), lambda w: w.long()), "int64 & floating",
    ),
    "bytes, as of a quantised one": (
        lambda model: with_first(in_unet(plain(model)), lambda w: w.byte()), "uint8 & floating",
    ),
    "yes and no": (
        lambda model: with_first(in_unet(plain(model)), lambda w: w > 0), "bool & floating",
    ),
    "an alpha of two parts": (
        lambda model: save({
            **kohya(plain(model)),
            next(iter(kohya(plain(model)))).split(".")[0] + ".alpha": torch.tensor(1j),
        }),
        "alpha & positive",
    ),
    "numbers of four bits": (
        head(
            json.dumps({
                f"{Q}.lora_A.weight": {"dtype": "F4", "shape": [2, 32], "data_offsets": [0, 32]},
                f"{Q}.lora_B.weight": {"dtype": "F4", "shape": [32, 2], "data_offsets": [32, 64]},
            }).encode(),
            bytes(64),
        ),
        "float4 & floating",
    ),
    "complex numbers": (
        lambda model: with_first(in_unet(plain(model)), lambda w: w.to(torch.complex64)),
        "complex64 & floating",
    ),
    "one NaN": (
        lambda model: with_first(in_unet(plain(model)), NOT_FINITE["one NaN"]), "not finite",
    ),
    "infinite": (lambda model: with_first(in_unet(plain(model)), lambda w: w / 0), "not finite"),
    "too large for float32": (
        lambda model: with_first(in_unet(plain(model)), lambda w: w.double() * 1e300),
        "not finite",
    ),
    "an infinite product": (
        lambda model: save(kohya(plain(model), {"": 3e38})), "not finite",
    ),
    "no columns": (lambda model: save(pair(torch.ones(2, 0), torch.ones(32, 2))), "does not fit"),
    "no rows": (lambda model: save(pair(torch.ones(2, 32), torch.ones(0, 2))), "does not fit"),
    "rank 0": (lambda model: save(pair(torch.ones(0, 32), torch.ones(32, 0))), "(0, 32)"),
    "rank 513": (
        lambda model: save(pair(torch.ones(513, 32), torch.ones(32, 513))), "its rank is 513 & 512",
    ),
    "a rank of a million beside many layers": (
        lambda model: save({
            **in_unet(plain(model)), **pair(torch.ones(10**6, 1), torch.ones(1, 10**6)),
        }),
        "its rank is 1000000 & 512",
    ),
    "two ranks in a pair": (
        lambda model: save(pair(torch.ones(2, 32), torch.ones(32, 3))), "(2, 32) & (32, 3)",
    ),
    "A without B": (lambda model: save({f"{Q}.lora_A.weight": torch.ones(2, 32)}), "without"),
    "alphas alone": (lambda model: save({f"{Q}.alpha": torch.tensor(1.0)}), "no LoRA in it"),
    "a layer that is nowhere": (
        lambda model: save(pair(torch.ones(2, 32), torch.ones(32, 2), "unet.x.to_q")), "no such",
    ),
    "a layer that is a path": (
        lambda model: save(pair(torch.ones(2, 32), torch.ones(32, 2), "unet.../../x.to_q")),
        "no such",
    ),
    "a layer whose name is long": (
        lambda model: save(pair(torch.ones(2, 32), torch.ones(32, 2), f"unet.{LONG}.to_q")),
        "no such",
    ),
    "names that are nothing": (lambda model: save({"": torch.ones(2, 2)}), "not of the attention"),
    "ten thousand tensors of other names": (
        lambda model: save({f"x{n}": torch.ones(1) for n in range(10_000)}), "not of the attention",
    ),
    "another model's": (
        lambda model: save(pair(torch.ones(2, 1280), torch.ones(1280, 2))), "does not fit",
    ),
    "so large that pictures are noise": (
        lambda model: save({n: 1e4 * w for n, w in in_unet(plain(model)).items()}), "noise",
    ),
    "so large that nothing is finite": (
        lambda model: save({n: 1e19 * w for n, w in in_unet(plain(model)).items()}), "not finite",
    ),
}  # fmt: skip


@table(lora=LORAS)
def test_a_lora_file_that_cannot_be_is_refused(studio, tmp_path, case):
    make, words = case
    folder = tmp_path / SECRET
    folder.mkdir()
    (folder / "upload.safetensors").write_bytes(make(studio.model))

    def begun() -> Run:
        lora = load_lora(folder / "upload.safetensors")
        return finish(studio.start(lora=lora, **{**SMALL, "rank": lora.rank}))

    refused(begun, words)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_lora_of_other_floats_is_taken(studio, tmp_path, dtype):
    state = {name: w.to(dtype) for name, w in diffusers(plain(studio.model)).items()}
    (tmp_path / "upload.safetensors").write_bytes(save(state))
    lora = load_lora(tmp_path / "upload.safetensors")
    run = finish(studio.start(lora=lora, **SMALL))
    for name, w in random_lora(studio.model).weights.items():
        assert torch.equal(run.lora.weights[name], w.to(dtype).float())
    forgotten(studio, run)


# Pictures


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png(width: int, height: int, *chunks: bytes, content: bytes | None = None) -> bytes:
    """A black one of 1 bit a pixel, whatever its size."""
    black = bytes(height * (1 + (width + 7) // 8)) if content is None else content
    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", size), *chunks, chunk(b"IDAT", zlib.compress(black, 1))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def strokes(kind: str = "PNG", **options: Any) -> bytes:
    return encoded(paint(side=32).convert(options.pop("mode", "RGBA")), kind, **options)


PICTURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "cannot be read"),
    "text": (lambda: b"not a picture", "cannot be read"),
    "a page": (lambda: b"<html><script>alert(1)</script></html>", "cannot be read"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "cannot be read"),
    "PostScript": (lambda: strokes("EPS", mode="RGB"), "cannot be read"),
    "PDF": (lambda: strokes("PDF", mode="RGB"), "cannot be read"),
    "the head alone": (lambda: strokes()[:8], "cannot be read"),
    **{
        f"{kind}, cut off": (
            lambda kind=kind: strokes(kind, mode="RGB")[: len(strokes(kind, mode="RGB")) // 2],
            "cannot be read",
        )
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    },
    "20 kB that are 13000 pixels wide and high": (
        lambda: png(13000, 13000), "169000000 & the most",
    ),
    "6000 pixels wide and high": (lambda: png(6000, 6000), "36000000 & the most"),
    "a head that is 10^5 wide and high": (
        lambda: png(100_000, 100_000, content=b""), "100000 & the most",
    ),
    "a head that is 2^31 wide and high": (
        lambda: png(2**31 - 1, 2**31 - 1, content=b""), "the most",
    ),
    "one pixel high and ten million wide": (lambda: png(10_000_000, 1), "10000000 & the most"),
    "a GIF that says 65535": (
        lambda: b"GIF89a\xff\xff\xff\xff\0\0\0," + b"\0\0\0\0\xff\xff\xff\xff\0\2\1\0\0;",
        "too large & the most",
    ),
    "a BMP that says 30000": (
        lambda: strokes("BMP", mode="RGB")[:18] + struct.pack("<ii", 30000, 30000)
        + strokes("BMP", mode="RGB")[26:],
        "too large & the most",
    ),
    "no pixels": (lambda: png(0, 0, content=b""), "cannot be read"),
    "fewer rows than it says": (lambda: png(64, 64, content=bytes(9)), "nothing is painted"),
    "a text chunk of 70 MB": (
        lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70_000_000), 1))),
        "cannot be read",
    ),
    "many text chunks": (
        lambda: png(8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000)))] * 100),
        "cannot be read",
    ),
    "a colour profile of 70 MB": (
        lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(70_000_000), 1))),
        "cannot be read",
    ),
    "a wrong checksum": (lambda: strokes().replace(b"IDAT", b"IDAX"), "cannot be read"),
    "an unknown way to compress": (
        lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 7, 9, 9, 9)),
        "cannot be read",
    ),
    "turned by nonsense": (
        lambda: png(8, 8, chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 40)),
        "nothing is painted",
    ),
    "a photograph": (
        lambda: encoded(Image.linear_gradient("L"), "PNG"), "in greys",
    ),
    "noise": (
        lambda: encoded(Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "PNG"),
        "differs from the run's own",
    ),
    "transparent": (lambda: encoded(Image.new("RGBA", (64, 64)), "PNG"), "nothing is painted"),
    "white": (lambda: encoded(Image.new("RGB", (64, 64), "white"), "PNG"), "nothing is painted"),
    "colours of another kind": (
        lambda: encoded(Image.new("LAB", (8, 8)), "TIFF"), "the colours LAB",
    ),
    "floats that are none": (
        lambda: encoded(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"), "not finite",
    ),
    "floats beyond 2": (
        lambda: encoded(Image.fromarray(np.full((8, 8), 9, np.float32)), "TIFF"), "reaches 9",
    ),
}  # fmt: skip


@table(picture=PICTURES)
def test_a_picture_that_cannot_be_is_refused(studio, run, tmp_path, case):
    make, words = case
    file = tmp_path / "paint"
    file.write_bytes(make())
    refused(lambda: finish(studio.step(run.id, PAINT, open_picture(file))), words)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_paint_of_every_usual_kind_is_taken_in_the_picture_s_size(studio, kind):
    big = paint(slice(0, 300), slice(300, 600), side=1200).convert("RGB")
    run = finish(studio.start(**SMALL))
    after = finish(studio.step(run.id, PAINT, open_picture(io.BytesIO(encoded(big, kind)))))
    wanted = torch.zeros(16, 16)
    wanted[:4], wanted[4:8] = 2, -2
    torch.testing.assert_close(after.painted[0].paint, wanted, atol=0.1, rtol=0)
    forgotten(studio, run)


# Values, as of the API

START: dict[str, tuple[dict[str, Any], str]] = {
    "steps 0": ({"steps": 0}, "steps is 0 & least"),
    "steps that are half": ({"steps": 2.5}, "steps is 2.5 & whole"),
    "steps that are text": ({"steps": "many"}, "steps is 'many'"),
    "steps that are a list": ({"steps": [3]}, "steps is [3]"),
    "more steps than a model has": ({"steps": 10**9}, "steps & the most"),
    "guidance that is no number": ({"guidance_scale": float("nan")}, "guidance_scale & a number"),
    "guidance without end": ({"guidance_scale": float("inf")}, "guidance_scale & the most"),
    "a seed below 0": ({"seed": -1}, "seed is -1"),
    "a seed beyond counting": ({"seed": 10**400}, "seed & the most"),
    "a seed that is text": ({"seed": "\udc80"}, "seed is"),
    "a seed that is true": ({"seed": True}, "seed is True"),
    "a rank beyond all": ({"rank": 513}, "rank is 513 & 512"),
    "a prompt that is a number": ({"prompt": 7}, "prompt is 7 & text"),
    "a prompt that is a list": ({"prompt": ["a"]}, "prompt is ['a'] & text"),
    "a prompt that is null": ({"prompt": None}, "prompt is None & text"),
    "a prompt that is no text": ({"prompt": "a\ud800b"}, "prompt & text"),
    "a prompt that is long": ({"prompt": LONG}, "prompt & at most"),
    "a setting that there is not": ({"x": 1}, "no setting called x"),
    "noise that there is not": ({"noise": "loud"}, "noise is 'loud' & own"),
    "noise that is a list": ({"noise": ["own"]}, "noise is ['own'] & own"),
    "blur that is no number": ({"blur": float("nan")}, "blur & a number"),
    "one image, compared": ({"images": 1}, "baseline & images is 1"),
}  # fmt: skip


@table(start=START)
def test_a_setting_that_cannot_be_is_refused(studio, case):
    settings, words = case
    refused(lambda: finish(studio.start(**{**SMALL, **settings})), words, SettingError)


STEP: dict[str, tuple[dict[str, Any], str]] = {
    "a run of no name": ({"run_id": ""}, "there is no run yet"),
    "a run that is a path": ({"run_id": "../../etc/passwd"}, "not the name of a run"),
    "a run that nobody has": ({"run_id": "a" * 16}, "no longer kept"),
    "a run whose name ends a line": ({"run_id": "a" * 16 + "\n"}, "not the name of a run"),
    "a run whose name is long": ({"run_id": LONG}, "not the name of a run"),
    "a strength below 0": ({"strength": -1}, "strength is -1"),
    "a strength that is no number": ({"strength": float("nan")}, "strength & a number"),
    "a strength without end": ({"strength": float("inf")}, "strength & the most"),
    "a strength of ten": ({"strength": 10}, "strength is 10 & 1"),
    "no images": ({"images": 0}, "images is 0"),
    "images beyond all": ({"images": 10**9}, "images & 1024"),
    "images that are half": ({"images": 2.5}, "images is 2.5 & whole"),
    "an unknown reward": ({"reward": ("poetry",)}, "no reward called 'poetry'"),
    "a reward that is a list": ({"reward": (["color"],)}, "no reward called ['color']"),
    "a reward of the command line": (
        {"reward": ("own", {"reward": "/etc/x.py:y"})}, "command line alone",
    ),
    "a mix": ({"reward": ("mix", {"part": ["1 color"]})}, "command line alone"),
    "an option that there is not": ({"reward": ("color", {"x": 1})}, "no option 'x'"),
    "options that are a list": ({"reward": ("color", ["blue"])}, "options"),
    "options that are text": ({"reward": ("color", "blue")}, "options"),
    "options with a number for a name": ({"reward": ("color", {1: 1})}, "no option 1"),
    "options with names of two types": ({"reward": ("color", {1: 1, "x": 1})}, "no option"),
    "a colour that is a number": ({"reward": ("color", {"color": 3})}, "color is 3"),
    "a colour that there is not": ({"reward": ("color", {"color": "hsl(a)"})}, "unknown"),
    "a colour that is long": ({"reward": ("color", {"color": LONG})}, "color & at most"),
    "a colour that is no text": ({"reward": ("color", {"color": "\ud800"})}, "color"),
    "a colour with too many digits": (
        {"reward": ("color", {"color": f"rgb({'9' * 5000},0,0)"})}, "unknown",
    ),
    "a label that there is not": ({"reward": ("segment", {"labels": ["Unicorn"]})}, "Unicorn"),
    "a label that is a number": ({"reward": ("segment", {"labels": [1]})}, "labels is [1]"),
    "a label that is long": ({"reward": ("segment", {"labels": [LONG]})}, "labels & a list"),
    "no label": ({"reward": ("segment", {"labels": []})}, "no label"),
    "a segmenter of the server": (
        {"reward": ("segment", {"segmenter": "/etc"})}, "here is only",
    ),
    "paint itself": ({"reward": ("paint", {"exact": True}), "painting": paint()}, "exact"),
    "less of nothing": ({"reward": ("paint", {"more": "Hair"})}, "more is 'Hair' & a list"),
    "a reward that is not here": ({"reward": ("describe", {"text": "x"})}, "not offered here"),
}  # fmt: skip


@table(step=STEP)
def test_a_step_that_cannot_be_is_refused(studio, run, case):
    values, words = case
    kind, *options = values.get("reward", ("color",))

    def step() -> Run:
        settings = {n: v for n, v in values.items() if n in ("strength", "images", "painting")}
        reward = RewardSpec(kind, *options)
        return finish(studio.step(values.get("run_id", run.id), reward, **settings))

    refused(step, words)


@pytest.mark.parametrize("count", [-1, 3, 10**9, 1.5, "1", None, True])
def test_an_update_that_there_is_not_is_refused(studio, run, count):
    refused(lambda: finish(studio.go_to(run.id, count)), "no update", RunError)


# Reward maps

MAPS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "one NaN pixel": (NOT_FINITE["one NaN"], "not finite & image 0"),
    "infinite": (lambda maps: maps / 0, "not finite"),
    "one infinite pixel": (
        lambda maps: torch.where(maps == maps.max(), torch.inf, maps), "not finite",
    ),
    "too large for float32": (lambda maps: maps.double() * 1e300, "not finite"),
    "too large to be added up": (lambda maps: torch.full_like(maps, 3e38), "3e+38 & the most"),
    "one too few": (lambda maps: maps[:-1], "3 & 4"),
    "of one number": (lambda maps: maps.mean((1, 2)), "shape (4,)"),
    "of colours": (lambda maps: maps[:, None].expand(-1, 3, -1, -1), "shape (4, 3, 16, 16)"),
    "without pixels": (lambda maps: maps[:, :0], "shape (4, 0, 16)"),
    "complex": (lambda maps: maps.to(torch.complex64), "complex64"),
    "nothing": (lambda maps: None, "NoneType"),
    "text": (lambda maps: "x", "str"),
    "an array of objects": (lambda maps: np.full((4, 16, 16), None), "ndarray"),
}  # fmt: skip


@pytest.fixture(scope="module")
def judged(studio) -> Run:
    """A run with four pictures to judge."""
    run = finish(studio.start(**SMALL))
    forgotten(studio, run)
    return finish(generate(studio.model, run))


def maps_of(run: Run) -> torch.Tensor:
    assert run.trajectory is not None
    return run.trajectory.images[:, 2] - 0.5


@table(maps=MAPS)
def test_reward_maps_that_cannot_be_are_refused(studio, judged, case):
    make, words = case
    maps = make(maps_of(judged))
    refused(lambda: finish(learn(studio.model, judged, maps)), words, RewardError)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16])
def test_reward_maps_of_other_numbers_are_taken(studio, judged, dtype):
    maps = maps_of(judged).sign().to(dtype)
    lora = finish(learn(studio.model, judged, maps)).lora
    wanted = finish(learn(studio.model, judged, maps.float())).lora
    assert all(torch.equal(lora.weights[name], wanted.weights[name]) for name in wanted.weights)


@pytest.mark.parametrize("baseline", ["global", "location"])
def test_rewards_all_alike_teach_nothing_and_are_said(studio, judged, baseline):
    maps = torch.full_like(maps_of(judged), 0.7)
    judged = replace(judged, settings=replace(judged.settings, baseline=baseline))
    after = finish(learn(studio.model, judged, maps)).updates[-1]
    assert after.lora is judged.lora and not after.learnt
    assert finish(learn(studio.model, judged, maps_of(judged))).updates[-1].learnt


# Messages


def test_a_message_is_one_line_that_keeps_its_beginning_and_its_end():
    error = PxpoError(f"prompt is\n{'x' * 5000!r};  the most is 3.")
    assert str(error).startswith("prompt is 'xxx") and str(error).endswith("; the most is 3.")
    assert len(str(error)) < 1000 and "\n" not in str(error)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("no file '/srv/our place/run.json'.", "no file 'run.json'."),
        ("[Errno 2] No such file: '/x/y'", "[Errno 2] No such file: 'y'"),
        ("neither /srv/a nor /srv/b/c.", "neither a nor c."),
        ("at C:\\Users\\ada l\\run", "at run"),
        ("at 'C:\\\\Users\\\\ada\\\\run'", "at 'run'"),
        ("at //server/share/run", "at run"),
        ("see https://huggingface.co/a/b", "see https://huggingface.co/a/b"),
        ("CompVis/sd, 3 / 4 and and/or", "CompVis/sd, 3 / 4 and and/or"),
    ],
)
def test_a_visitor_sees_no_folder_of_the_server(message, shown):
    assert RunError(message).for_visitors() == shown


# Nobody else has noticed


@pytest.mark.usefixtures("good")  # whose archive is there before the test, so it leaves none
def test_the_other_person_goes_on_bit_for_bit(studio, run, tmp_path):
    alone = Studio(studio.model, studio.segmenter, tmp_path)
    kept = alone.admit(studio.archive(run.id))
    theirs = finish(alone.step(kept.id, PAINT))
    ours = finish(studio.step(run.id, PAINT))
    assert same(ours, theirs) and ours.count == 3
    studio._keep(run)
