"""From the text or the parts of a row to token ids, and which token is of which part.

This module knows nothing of how long a text may be. Special tokens are those that a tokenizer gives
a meaning of its own, such as "[SEP]".
"""

import copy
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from skqlora.settings.adapter_settings import TextSettings
from skqlora.settings.template import Template, is_for_one_text

Row = str | tuple[str, ...]


class Encoding(NamedTuple):
    """The uncut tokens of a row.

    Attributes
    ----------
    ids : ndarray of int, of shape (n_tokens,), or (2, n_tokens) with token types as second row
    part_of : ndarray of int, of shape (n_tokens,)
        The number of the text or field that a token is of; -1 for special tokens and the prompt's.
    """

    ids: np.ndarray
    part_of: np.ndarray

    @property
    def token_ids(self) -> np.ndarray:
        """The token ids alone, of shape (n_tokens,)."""
        return self.ids if self.ids.ndim == 1 else self.ids[0]


class RowEncoder:
    """A tokenizer that says which tokens are of which part of a row.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    @functools.cached_property
    def _special_tokens(self) -> set[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        special = {*self._tokenizer.all_special_tokens, *(str(t) for t in added if t.special)}
        return special - {""}

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        """The pattern of a special token in a prompt."""
        return re.compile("|".join(map(re.escape, self._special_tokens)) or "(?!)")

    @functools.cached_property
    def _special_ids(self) -> set[int]:
        return set(self._tokenizer.convert_tokens_to_ids(sorted(self._special_tokens)))

    @functools.cached_property
    def plain_tokenizer(self) -> Any:
        """A copy of the tokenizer to which special tokens in a text are text like any other."""
        plain = copy.deepcopy(self._tokenizer)
        plain.split_special_tokens = True
        return plain

    def count_kept(self, row: Row, settings: TextSettings) -> tuple[int, str]:
        """Count the tokens that are never cut, and say what they are.

        Parameters
        ----------
        row : str or tuple of str
            Any row of the kind that is to be encoded.
        settings : TextSettings

        Raises
        ------
        ValueError
            If the tokenizer is too simple for a prompt or for several parts, or if there are more
            than two parts and no prompt.
        """
        is_pair, prompt = not isinstance(row, str) and settings.prompt is None, settings.prompt
        n_special = self._tokenizer.num_special_tokens_to_add(pair=is_pair)
        if is_pair and len(row) != 2:
            raise ValueError(
                f"Got {len(row)} columns without a prompt. Wanted: two, which the tokenizer takes "
                "as a pair; or a prompt with a field for each, e.g. '{0}: {1}'."
            )
        if (is_pair or prompt is not None) and not self._tokenizer.is_fast:
            raise ValueError(
                f"Got {'two columns' if is_pair else f'prompt={prompt!r}'} but the model's "
                "tokenizer cannot say which tokens are the text's. Wanted: one column and "
                "prompt=None, or a model with a tokenizer.json."
            )
        template = _template(row, prompt)
        if template is None:
            each = "pair of texts" if is_pair else "text"
            return n_special, f"the tokenizer adds {n_special} special tokens to each {each}"
        # Between two fields with nothing in them, the tokens of the prompt would merge.
        filled = ("a",) * len(template.fields)
        (encoding,) = self._encode(self._tokenizer, [filled], template)
        n_kept = int((encoding.part_of < 0).sum())
        return n_kept, f"the prompt and {n_special} special tokens take {n_kept}"

    def encode(self, rows: Sequence[Row], settings: TextSettings) -> Iterator[Encoding]:
        """Yield the uncut tokens of each row.

        Parameters
        ----------
        rows : sequence of str or of tuple of str
            Texts, pairs of texts, or texts for the fields of the prompt; all of one kind.
        settings : TextSettings
        """
        template = _template(rows[0], settings.prompt)
        types = settings.token_type_ids
        for row, encoding in zip(
            rows, self._encode(self._tokenizer, rows, template, types), strict=True
        ):
            of_parts = encoding.token_ids[encoding.part_of >= 0]
            found = self._special_ids.intersection(of_parts.tolist())
            if found and not settings.parse_special_tokens:
                yield self._as_text(row, template, types)
            else:
                yield encoding

    def _encode(
        self,
        tokenizer: Any,
        rows: Sequence[Row],
        template: Template | None,
        types: bool = False,
        *,
        add_special_tokens: bool = True,
    ) -> Iterator[Encoding]:
        """Encode rows in one call of a tokenizer, whatever special tokens are in their parts."""
        parts = [(row,) if isinstance(row, str) else row for row in rows]
        is_pair = template is None and len(parts[0]) == 2
        encoding = tokenizer(
            [each[0] for each in parts] if template is None else list(map(template.fill, parts)),
            [each[1] for each in parts] if is_pair else None,
            add_special_tokens=add_special_tokens,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=is_pair and types,
            return_special_tokens_mask=True,
            return_offsets_mapping=template is not None,
            verbose=False,
        )
        for number, ids in enumerate(encoding["input_ids"]):
            is_special = np.array(encoding["special_tokens_mask"][number], dtype=bool)
            part_of = np.zeros(len(ids), dtype=np.int64)
            if is_pair:
                sequences = encoding.sequence_ids(number)
                part_of = np.array([-1 if part is None else part for part in sequences])
            elif template is not None:
                offsets = np.array(encoding["offset_mapping"][number]).reshape(-1, 2)
                part_of = _parts_by_offset(offsets, template, parts[number])
            part_of[is_special] = -1
            tokens = ids
            if is_pair and types:
                tokens = [ids, encoding["token_type_ids"][number]]
            yield Encoding(np.array(tokens, dtype=np.int32), part_of)

    def _as_text(self, row: Row, template: Template | None, types: bool) -> Encoding:
        """Encode a row whose parts hold special tokens, which are tokens only in the prompt."""
        if template is None:
            return next(self._encode(self.plain_tokenizer, [row], None, types))
        before, *between, after = template.literals
        start = max((found.end() for found in self._special.finditer(before)), default=0)
        stop = next((found.start() for found in self._special.finditer(after)), len(after))
        outer = before[:start] + after[stop:]
        near = Template((before[start:], *between, after[:stop]), template.fields)
        parts = (row,) if isinstance(row, str) else row
        if not outer and not any(map(self._special.search, between)):
            return next(self._encode(self.plain_tokenizer, [parts], near))
        own = self._join(self._pieces(near, parts))
        around, place = self._around(outer, before[:start])
        ids = [*around[:place], *own.ids, *around[place:]]
        part_of = np.full(len(ids), -1)
        part_of[place : place + len(own.ids)] = own.part_of
        return Encoding(np.array(ids, dtype=np.int32), part_of)

    def _around(self, outer: str, before: str) -> tuple[list[int], int]:
        """Encode what is outside of the outermost special tokens of a prompt, and these.

        Returns
        -------
        ids : list of int
        place : int
            Where in them the rest belongs.
        """
        if not outer:
            mask = self._tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
            return self._tokenizer("")["input_ids"], mask.index(0)
        around = self._tokenizer(outer, return_offsets_mapping=True)
        ends = np.array(around["offset_mapping"])[:, 1]
        n_before = len(self._tokenizer(before, add_special_tokens=False)["input_ids"])
        return around["input_ids"], int(np.flatnonzero(ends > 0)[0]) + n_before

    def _pieces(self, template: Template, parts: tuple[str, ...]) -> Iterator[Encoding]:
        """Encode a template piece by piece, cut at the special tokens between its fields.

        Between two special tokens a tokenizer takes each piece for itself.
        """
        first, literals = 0, [template.literals[0]]
        for number, literal in enumerate(template.literals[1:], start=1):
            texts = self._special.split(literal)
            literals.append(texts[0])
            for special, text in zip(self._special.findall(literal), texts[1:], strict=True):
                yield self._piece(template, parts, first, literals)
                token = self._tokenizer.convert_tokens_to_ids(special)
                yield Encoding(np.array([token], dtype=np.int32), np.array([-1]))
                first, literals = number, [text]
        yield self._piece(template, parts, first, literals)

    def _piece(
        self, template: Template, parts: tuple[str, ...], first: int, literals: list[str]
    ) -> Encoding:
        """Encode the fields from a number on, as many as there are places between literals."""
        fields = slice(first, first + len(literals) - 1)
        piece = Template(tuple(literals), template.fields[fields])
        (encoding,) = self._encode(
            self.plain_tokenizer, [parts[fields]], piece, add_special_tokens=False
        )
        part_of = encoding.part_of
        return Encoding(encoding.ids, np.where(part_of < 0, part_of, part_of + first))

    @staticmethod
    def _join(pieces: Iterator[Encoding]) -> Encoding:
        ids, part_of = zip(*pieces, strict=True)
        return Encoding(np.concatenate(ids), np.concatenate(part_of))


def _template(row: Row, prompt: str | None) -> Template | None:
    """Read the prompt as it is meant for rows of this kind."""
    if prompt is None:
        return None
    if isinstance(row, str) and is_for_one_text(prompt):
        return Template.of_one_text(prompt)
    return Template.of_columns(prompt)


def _parts_by_offset(offsets: np.ndarray, template: Template, parts: tuple[str, ...]) -> np.ndarray:
    """Find which tokens of a filled template are of which of its fields.

    Parameters
    ----------
    offsets : ndarray of int, of shape (n_tokens, 2)
        Where in the filled template each token begins and ends.
    template : Template
    parts : tuple of str

    Returns
    -------
    part_of : ndarray of int, of shape (n_tokens,)
    """
    starts, stops = offsets.T
    part_of = np.full(len(offsets), -1)
    end = 0
    for number, part in enumerate(parts):
        literal = template.literals[number]
        begin = end + len(literal)
        # The prompt's last space may be part of the text's first token.
        first = end + len(literal.rstrip())
        end = begin + len(part)
        part_of[(stops > begin) & (starts >= first) & (stops <= end)] = number
    return part_of
