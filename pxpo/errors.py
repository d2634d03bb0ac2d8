"""What can go wrong, by kind. Each message names the value, the limit and the way out."""

import re

LONGEST = 800
"""Characters of a message; of a longer one, with a whole file in it say, the middle is left out."""

FOLDERS = re.compile(
    r"(?<![\w.:/\\])(?:file:)?(?:[A-Za-z]:)?"
    r"""[/\\]+(?:[^\s'"/\\]+(?:[ ][^\s'"/\\]+)*[/\\]+)*(?=[^\s'"/\\])"""
)
"""All but the last part of an absolute path; blanks are taken for part of a folder's name."""

QUOTED = re.compile(r"""(['"])(?:file:)?(?:[A-Za-z]:)?[/\\](?:(?!\1).)*[/\\](?=[^/\\])(?!\1)""")
"""The same of a path in quotes, which may have any other sign in it."""


class PxpoError(Exception):
    """Any error that a person can do something about; its message is one line, fit to be shown."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"
        super().__init__(line)

    def for_visitors(self) -> str:
        """The message without the folders of this machine."""
        return without_folders(str(self))


def without_folders(text: str) -> str:
    """`text` with the last part alone of each absolute path in it."""
    return FOLDERS.sub("", QUOTED.sub(r"\1", text))


class SettingError(PxpoError, ValueError):
    """A setting or an argument outside what it may be."""


class ModelError(PxpoError):
    """A base model that cannot be loaded, or whose shape this program does not know."""


class RewardError(PxpoError, ValueError):
    """A reward map that cannot be made, or that does not fit the images."""


class LoraError(PxpoError):
    """A LoRA that cannot be read, or that does not fit the base model."""


class DivergedError(PxpoError):
    """Weights, or an update of them, that turn pictures to noise; the LoRA is as it was before."""


class RunError(PxpoError):
    """A run that cannot be read, written or continued."""


class BusyError(PxpoError):
    """More people want something than can be served; it is to be asked for again."""


class ProcessError(PxpoError):
    """Another of the processes that share the work is gone."""


class HubError(PxpoError):
    """The Hub refused, or cannot be reached; what was to be pushed is still on disk."""
