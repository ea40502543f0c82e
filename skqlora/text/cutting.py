"""Fitting the tokens of a row into `max_length`, by cutting some off or by making windows.

Special tokens and those of a prompt are never cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from skqlora._utils.messages import warn
from skqlora.settings.adapter_settings import TextSettings
from skqlora.text.encoding import Encoding, Row
from skqlora.text.values import short

HEAD_PART = 4  # where head and tail of a text are kept, the head is one part in this many


class Encoded(NamedTuple):
    """The ids of a row in one or several windows, and the parts with ids that are in no window."""

    windows: tuple[np.ndarray, ...]
    cut_parts: tuple[int, ...] = ()


@dataclass
class Cuts:
    """How many of many texts are cut, for one warning about all of them.

    Attributes
    ----------
    n_texts, n_cut : int
    parts : set of int
        The parts of rows that are cut, by their numbers: fields of a prompt, or texts of a pair.
    """

    n_texts: int = 0
    n_cut: int = 0
    parts: set[int] = field(default_factory=set)

    def add(self, encoded: Sequence[Encoded]) -> None:
        """Count texts."""
        self.n_texts += len(encoded)
        self.n_cut += sum(bool(text.cut_parts) for text in encoded)
        self.parts.update(part for text in encoded for part in text.cut_parts)

    def warn(self, settings: TextSettings, remedy: str, names: Sequence[str] = ()) -> None:
        """Warn if texts were cut.

        Parameters
        ----------
        settings : TextSettings
        remedy : str
            What the user can do.
        names : sequence of str, optional
            The names of the parts of a row, if it has several.
        """
        if not self.n_cut:
            return
        cut = [repr(name) for number, name in enumerate(names) if number in self.parts]
        where = f", in {', '.join(dict.fromkeys(cut))}" if len(names) > 1 else ""
        warn(
            f"{self.n_cut / self.n_texts:.1%} of {self.n_texts} texts have more than max_length="
            f"{settings.max_length} tokens and are cut (truncation={settings.truncation!r})"
            f"{where}. {remedy}"
        )


def fit_into(encoding: Encoding, settings: TextSettings, row: Row) -> Encoded:
    """Fit the tokens of a row into `max_length`.

    Parameters
    ----------
    encoding : Encoding
    settings : TextSettings
    row : str or tuple of str
        What is encoded, for messages.

    Returns
    -------
    encoded : Encoded
        Without windows, the longest parts are cut first, down to the length of the next ones. With
        windows, one part slides and the others stay whole.

    Raises
    ------
    ValueError
        If the prompt takes all of `max_length`, or with windows the parts that stay whole do.
    """
    ids, part_of = encoding
    n_tokens = len(part_of)
    if n_tokens <= settings.max_length:
        return Encoded((ids,))
    spans = _spans(part_of)
    lengths = [stop - start for start, stop in spans]
    room = settings.max_length - (n_tokens - sum(lengths))
    if room < 1 and settings.prompt is not None:
        raise ValueError(
            f"Got max_length={settings.max_length} but in the row {short(row)} the prompt and "
            f"special tokens take {n_tokens - sum(lengths)}. Wanted: room for the text. Pass a "
            "greater max_length to `fit`."
        )
    keep = np.ones(n_tokens, dtype=bool)
    if room < 1:  # the text consists of special tokens
        for start, stop in spans:
            keep[start:stop] = False
        return Encoded((ids[..., keep][..., : settings.max_length],), tuple(range(len(spans))))
    if settings.truncation == "windows":
        return Encoded(tuple(_windows(ids, spans, room, settings, row)))
    shares = share_room(lengths, room)
    for (start, stop), share in zip(spans, shares, strict=True):
        n_head = {"head": share, "tail": 0, "head+tail": share // HEAD_PART}[settings.truncation]
        keep[start + n_head : stop - (share - n_head)] = False
    return Encoded((ids[..., keep],), tuple(np.flatnonzero(np.less(shares, lengths)).tolist()))


def share_room(lengths: list[int], room: int) -> list[int]:
    """Share tokens out among parts, so that the longest are cut first.

    For two parts this is what "longest_first" is to the tokenizers of Transformers.

    Parameters
    ----------
    lengths : list of int
    room : int
        The number of tokens to share out.

    Returns
    -------
    shares : list of int
        At most the length of each part, and `room` in sum unless all fit.
    """
    shares = list(lengths)
    # The shortest parts choose first; each may take an equal part of what is left by then.
    order = sorted(range(len(lengths)), key=lambda part: lengths[part])
    for n_chosen, part in enumerate(order):
        shares[part] = min(lengths[part], room // (len(order) - n_chosen))
        room -= shares[part]
    return shares


def _spans(part_of: np.ndarray) -> list[tuple[int, int]]:
    """Find where each part begins and ends; there is always a first part."""
    spans = []
    for part in range(max(1, int(part_of.max()) + 1)):
        places = np.flatnonzero(part_of == part)
        spans.append((int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0))
    return spans


def _windows(
    ids: np.ndarray,
    spans: list[tuple[int, int]],
    room: int,
    settings: TextSettings,
    row: Row,
) -> list[np.ndarray]:
    """Cut the part that slides into windows, and put each between the parts that stay whole.

    That is the second part of a pair, and the longest field of a prompt.
    """
    lengths = [stop - start for start, stop in spans]
    sliding = int(np.argmax(lengths)) if settings.prompt is not None else len(spans) - 1
    start, stop = spans[sliding]
    n_tokens = lengths[sliding]
    room -= sum(lengths) - n_tokens
    if room < 1:
        whole = "the first column" if settings.prompt is None else "all but the longest field"
        raise ValueError(
            f"Got truncation='windows' and the row {short(row)}, in which {whole} takes all of "
            f"max_length={settings.max_length} tokens. Wanted: room for the part that is cut into "
            "windows. Shorten the row, or fit with the longer text in the second column, with a "
            "greater max_length or with another truncation."
        )
    step = max(room - settings.stride, -(-room // 2))
    windows = []
    # The last window is as long as the others, since it counts as much as they do.
    for first in [*range(0, n_tokens - room, step), n_tokens - room]:
        keep = np.ones(ids.shape[-1], dtype=bool)
        keep[start:stop] = False
        keep[start + first : start + first + room] = True
        windows.append(ids[..., keep])
    return windows
