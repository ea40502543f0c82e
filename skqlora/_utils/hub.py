"""What the library of the Hugging Face Hub raises, in plain words."""

from collections.abc import Iterator

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def plain_reason(error: BaseException, model: str, revision: str | None) -> str | None:
    """Say in whole sentences why the Hub did not give a file, and what to do.

    Parameters
    ----------
    error : BaseException
        What transformers raised. The Hub's error is among its causes.
    model : str
        The id of the model.
    revision : str or None

    Returns
    -------
    reason : str or None
        None if the error is not the Hub's.
    """
    where = "the Hub cannot be reached. Check the network"
    if is_offline_mode():
        where = "this process is offline (HF_HUB_OFFLINE)"
    not_here = (
        f"{'It' if revision is None else f'Its revision={revision!r}'} is not in the Hub's cache, "
        f"and {where}."
    )
    reasons: dict[type[Exception], str] = {  # the first that fits: some kinds are kinds of others
        GatedRepoError: (
            "The Hub gives it only to those who have accepted its terms. Accept them on "
            f"https://huggingface.co/{model} and log in: `hf auth login`."
        ),
        RepositoryNotFoundError: (
            "There is no such model on the Hub, or it is private. Copy its id from its page; if it "
            "is private, log in first: `hf auth login`."
        ),
        RevisionNotFoundError: (
            f"It has no revision={revision!r} on the Hub. Pass a branch, tag or commit of "
            f"https://huggingface.co/{model}, or revision=None."
        ),
        LocalEntryNotFoundError: not_here,
        OfflineModeIsEnabled: not_here,
        HFValidationError: "This is neither a folder nor of the form of an id of the Hub.",
        RemoteEntryNotFoundError: "Its repository on the Hub lacks a file that is needed.",
        HfHubHTTPError: "The Hub answered with an error. Try again later.",
    }
    found = (
        reason
        for cause in _causes(error)
        for kind, reason in reasons.items()
        if isinstance(cause, kind)
    )
    return next(found, None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Follow an error to what raised it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
