"""What can go wrong, by kind. Each message names the value, the limit and the way out."""


class PxpoError(Exception):
    """Any error that a person can do something about; its message is fit to be shown to them."""


class SettingError(PxpoError, ValueError):
    """A setting or an argument outside what it may be."""


class ModelError(PxpoError):
    """A base model that cannot be loaded, or whose shape this program does not know."""


class RewardError(PxpoError, ValueError):
    """A reward map that cannot be made, or that does not fit the images."""


class LoraError(PxpoError):
    """A LoRA that cannot be read, or that does not fit the base model."""


class DivergedError(PxpoError):
    """An update whose gradient is not finite; the LoRA is as it was before."""


class RunError(PxpoError):
    """A run that cannot be read, written or continued."""


class ProcessError(PxpoError):
    """Another of the processes that share the work is gone."""


class HubError(PxpoError):
    """The Hub refused, or cannot be reached; what was to be pushed is still on disk."""
