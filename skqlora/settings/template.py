"""Prompts as templates: literal text, and fields into which the columns of a row are put.

This module knows nothing of tables or tokens.
"""

from dataclasses import dataclass
from string import Formatter

TEXT_FIELD = "{text}"  # the place of the only text of a row


@dataclass(frozen=True)
class Field:
    """A place for a column, written as in `str.format`: ``{name!conversion:spec}``.

    Attributes
    ----------
    key : str
        The name of a column, or its position.
    conversion : str or None
    spec : str
    """

    key: str
    conversion: str | None = None
    spec: str = ""

    def format(self, value: object) -> str:
        """Turn a value into text as `str.format` does, and without a specification as `str` does.

        Raises
        ------
        ValueError, TypeError
            If the value cannot be formatted in this way.
        """
        formatter = Formatter()
        value = formatter.convert_field(value, self.conversion)
        return formatter.format_field(value, self.spec) if self.spec else str(value)


@dataclass(frozen=True)
class Template:
    """A prompt in its parts.

    Attributes
    ----------
    literals : tuple of str, of length n_fields + 1
        The text before each field, and that after the last one.
    fields : tuple of Field, of length n_fields
    """

    literals: tuple[str, ...]
    fields: tuple[Field, ...]

    @classmethod
    def of_one_text(cls, prompt: str) -> "Template":
        """Read a prompt whose only field is ``{text}``. All its other braces are literal."""
        before, _, after = prompt.partition(TEXT_FIELD)
        return cls((before, after), (Field("text"),))

    @classmethod
    def of_columns(cls, prompt: str) -> "Template":
        """Read a prompt with the grammar of `str.format`, in which ``{{`` is a literal brace.

        Raises
        ------
        ValueError
            If the prompt is not of that grammar, or has no field.
        """
        literals, fields = [""], []
        try:
            for literal, key, spec, conversion in Formatter().parse(prompt):
                literals[-1] += literal
                if key is not None:
                    fields.append(Field(key, conversion, spec or ""))
                    literals.append("")
        except ValueError as error:
            raise ValueError(f"Got prompt={prompt!r}: {error}. {WANTED}") from error
        if not fields or any("{" in field.spec for field in fields):
            raise ValueError(f"Got prompt={prompt!r}. {WANTED}")
        return cls(tuple(literals), tuple(fields))

    def fill(self, values: tuple[str, ...]) -> str:
        """Put text into the fields. Braces in it are never interpreted."""
        parts = [self.literals[0]]
        for value, literal in zip(values, self.literals[1:], strict=True):
            parts += [value, literal]
        return "".join(parts)


WANTED = (
    f"Wanted: a template with one {TEXT_FIELD}, the place of the text, e.g. "
    f"{TEXT_FIELD + chr(10) + 'Label:'!r}; for several columns fields with their names or "
    "positions, e.g. '{title}: {body}' or '{0}: {1}', in which {{ and }} are literal braces."
)


def is_for_one_text(prompt: str) -> bool:
    """Return whether a prompt may be read by `Template.of_one_text`."""
    return prompt.count(TEXT_FIELD) == 1


def check_prompt(prompt: str | None) -> None:
    """Refuse a prompt that neither one text nor the columns of a table can be put into.

    Raises
    ------
    ValueError
    """
    if prompt is not None and not is_for_one_text(prompt):
        Template.of_columns(prompt)


def prompt_of_lines(names: tuple[str, ...] | None, n_columns: int) -> str:
    """Return a prompt with a line ``name: value`` for each column, or ``value`` without names."""
    fields = [f"{{{number}}}" for number in range(n_columns)]
    if names is not None:
        literal = (name.replace("{", "{{").replace("}", "}}") for name in names)
        fields = [f"{name}: {field}" for name, field in zip(literal, fields, strict=True)]
    return "\n".join(fields)
