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
        RemoteEntryNotFoundError: "Its repository on the Hub lacks a file that is needed.",
        HfHubHTTPError: _said_by_status(error),
        LocalEntryNotFoundError: not_here,
        OfflineModeIsEnabled: not_here,
        HFValidationError: "This is neither a folder nor of the form of an id of the Hub.",
    }
    # An answer of the Hub comes first, because the error that wraps it says only that the file is
    # not in the cache.
    causes = sorted(_causes(error), key=lambda cause: not isinstance(cause, HfHubHTTPError))
    found = (
        reason for cause in causes for kind, reason in reasons.items() if isinstance(cause, kind)
    )
    return next(found, None)


def _said_by_status(error: BaseException) -> str:
    """Say what the status of the Hub's answer means, if there was an answer."""
    answers = (cause.response for cause in _causes(error) if isinstance(cause, HfHubHTTPError))
    status = next((answer.status_code for answer in answers), None)
    if status == 401:
        return (
            "The Hub does not accept the token of this machine: it is not valid, or has expired. "
            "Log in again: `hf auth login`, or renew HF_TOKEN where that is set."
        )
    if status == 403:
        return (
            "The Hub gives no permission to read it. Ask its owner for permission, or log in with "
            "a token that has it: `hf auth login`."
        )
    return f"The Hub answered with {status}. Try again later."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Follow an error to what raised it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
