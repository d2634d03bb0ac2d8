"""Push a finished LoRA's folder to the Hugging Face Hub, and pull one to go on with.

Whatever goes wrong is a HubError with the way out, and the folder stays on disk, so that pushing
again works. A token is used and forgotten: never stored, logged, or written into a run.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .checks import network_fault
from .errors import HubError
from .lora import Lora
from .lora_files import FILE_NAME, PEFT_CONFIG, PEFT_FILE, load_lora
from .progress import Progress

ENDPOINT: str | None = None
"""The Hub's address; None means HF_ENDPOINT's or huggingface.co."""


def push(
    folder: Path,
    repo: str,
    *,
    token: str | None = None,
    private: bool = False,
    base: str | Path | None = None,
) -> Generator[Progress, None, str]:
    """Make `repo` (OWNER/NAME) hold the files of `folder`, as one commit; returns its address.

    token: one that may write to `repo`; when None, HF_TOKEN or the one of `hf auth login`. A
    repository that exists gets a new commit if it holds a LoRA of ours, and is refused otherwise,
    as is one of an owner whom the token does not speak for: before anything is written.
    base: a diffusers folder whose pipeline goes into the repository's base/.
    """
    api = HfApi(ENDPOINT, token)
    files = {path.name: path for path in sorted(Path(folder).iterdir()) if path.is_file()}
    if FILE_NAME not in files:
        raise HubError(f"there is no LoRA in {str(folder)!r}; nothing was pushed.")
    if base:
        files |= {f"base/{name}": path for name, path in pipeline_files(Path(base)).items()}
    total = len(files) + 2
    with explained(repo):
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HubError(f"{repo!r} is not the name of a repository; write it as OWNER/NAME.")
        yield Progress("asking who you are", 0, total)
        _check_owner(api, repo)
        _check_free(api, repo, private)
        yield Progress("creating the repository", 1, total)
        api.create_repo(repo, private=private, exist_ok=True)
        additions = []
        for number, (name, path) in enumerate(files.items()):
            addition = CommitOperationAdd(name, path)
            api.preupload_lfs_files(repo, [addition])
            additions.append(addition)
            yield Progress("uploading", number + 2, total)
        commit = api.create_commit(repo, additions, commit_message="A LoRA by PXPO Studio")
        yield Progress("uploading", total, total)
        return str(commit.repo_url)


def pipeline_files(folder: Path) -> dict[str, Path]:
    """The files of the diffusers pipeline in `folder`, by their names in it, and its card.

    Only what model_index.json names: whatever else lies in that folder is nobody's business.
    Raises HubError where there is no pipeline.
    """
    try:
        parts = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = [part for part in parts if not part.startswith("_") and "/" not in part]
    except (OSError, ValueError, AttributeError) as error:
        raise HubError(
            f"the base model {str(folder)!r} is no diffusers folder; push without it. Nothing was "
            "written."
        ) from error
    there = [folder / "model_index.json", folder / "README.md"]
    there += [
        path for part in parts for path in sorted((folder / part).glob("*"))
        if path.suffix in (".json", ".txt", ".model", ".safetensors")
    ]  # fmt: skip
    return {path.relative_to(folder).as_posix(): path for path in there if path.is_file()}


def pull(source: str, *, token: str | None = None) -> Lora:
    """A LoRA to go on with, from a file, a folder, or a repository on the Hub; safetensors only."""
    if Path(source).exists():
        return load_lora(Path(source))
    if source.count("/") != 1 or source.endswith(".safetensors"):
        raise HubError(
            f"there is no file or folder {source!r}; give the path of a LoRA, or OWNER/NAME on "
            "the Hub."
        )
    with explained(source, PULLING):
        file = _fetched(HfApi(ENDPOINT, token), source)
    return load_lora(file)


def _fetched(api: HfApi, repo: str) -> Path:
    """The LoRA in a repository: diffusers' file, or else PEFT's, with its config beside it."""
    try:
        return Path(api.hf_hub_download(repo, FILE_NAME))
    except RemoteEntryNotFoundError:
        api.hf_hub_download(repo, PEFT_CONFIG)
        return Path(api.hf_hub_download(repo, PEFT_FILE))


def _check_owner(api: HfApi, repo: str) -> None:
    me = api.whoami()
    owner = repo.split("/")[0]
    mine = [me["name"], *(org["name"] for org in me.get("orgs", ()))]
    if owner not in mine:
        raise HubError(
            f"{repo!r} belongs to {owner!r}, and this token speaks for {', '.join(mine)}; "
            f"push to {me['name']}/{repo.split('/')[1]} instead. Nothing was written."
        )


def _check_free(api: HfApi, repo: str, private: bool) -> None:
    """Refuse a repository that holds something else than a LoRA of ours, or that all can see where
    nobody shall: the Hub leaves it as it is."""
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        return
    files = {file.rfilename for file in info.siblings or ()} - {".gitattributes"}
    if files and "pxpo" not in (info.tags or ()):
        raise HubError(
            f"{repo!r} exists and holds another model; choose another name. Nothing was written."
        )
    if private and info.private is False:
        raise HubError(
            f"{repo!r} exists and is public; make it private in its settings on the Hub, or choose "
            "another name. Nothing was written."
        )


PUSHING = {
    401: "the token is not valid or has expired; make a new one with write access",
    403: "the token may not write to {repo!r}; it needs the right to write there",
    404: "there is no repository {repo!r}, or this token may not see it",
    409: "{repo!r} was changed at the same time",
    429: "the Hub asks to slow down; wait a few minutes",
}
PULLING = {
    401: "the token is not valid or has expired; make a new one, or do without",
    403: "{repo!r} is gated or private; ask for access on its page, and sign in with HF_TOKEN or "
    "`hf auth login`",
    404: "there is neither a file or folder {repo!r} here nor such a repository on the Hub that "
    "may be seen; correct the name or, if it is private, set HF_TOKEN or run `hf auth login`",
    429: PUSHING[429],
}
"""What the Hub's answers mean, by their status, and the way out."""


@contextmanager
def explained(repo: str, meaning: dict[int, str] = PUSHING) -> Iterator[None]:
    """The Hub's errors as HubErrors."""
    if fault := network_fault():
        raise HubError(fault)
    try:
        yield
    except HFValidationError as error:
        raise HubError(
            f"{repo!r} is not the name of a repository ({error}); write it as OWNER/NAME with "
            "letters, digits, '-', '_' and '.'."
        ) from error
    except LocalTokenNotFoundError as error:
        raise HubError(
            "there is no token; sign in, set HF_TOKEN, or run `hf auth login`, and push again."
        ) from error
    except RemoteEntryNotFoundError as error:
        raise HubError(
            f"{repo!r} has neither {FILE_NAME} nor {PEFT_FILE} with {PEFT_CONFIG}; download the "
            "file you mean, and give its path."
        ) from error
    except LocalEntryNotFoundError as error:  # not in the cache either: why not fetched?
        raise HubError(_reason(error.__cause__ or error, repo, meaning)) from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        raise HubError(_reason(error, repo, meaning)) from error


def _reason(error: BaseException, repo: str, meaning: dict[int, str]) -> str:
    pulling = meaning is PULLING
    again = "Then pull again." if pulling else "The LoRA is still on disk: push again."
    if isinstance(error, OfflineModeIsEnabled):
        here = f", and {repo!r} is not in the cache" if pulling else ""
        return f"HF_HUB_OFFLINE is set{here}; unset it. {again}"
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub cannot be reached ({error}). {again}"
    status = error.response.status_code
    if isinstance(error, RepositoryNotFoundError):  # also 401 where there is no token
        status = 403 if isinstance(error, GatedRepoError) else 404
    if status in meaning:
        return f"{meaning[status].format(repo=repo)}. {again}"
    return f"the Hub answered {status} ({error.server_message or 'no reason given'}). {again}"
