"""Which tensors of a checkpoint belong to the part that reads text."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

UNREAD = "unread."  # a prefix that no module has


@dataclass(frozen=True, eq=False)
class TextWeights:
    """Where a checkpoint of more than the text model keeps the tensors of the text model.

    A name in the checkpoint becomes a name in the text model in three steps: the changes of names
    that transformers knows for the whole model, the loss of a prefix, and the changes of names and
    of shapes that transformers knows for the text model.

    Attributes
    ----------
    skeleton : transformers.PreTrainedModel
        The text model on the meta device.
    of_whole : list of transformers.core_model_loading.WeightTransform
        The changes for the whole model.
    prefix : str
        What the names of the tensors then begin with, such as "model.language_model.".
    """

    skeleton: PreTrainedModel
    of_whole: list[WeightTransform]
    prefix: str

    @classmethod
    def locate(
        cls, skeleton: PreTrainedModel, whole: PreTrainedConfig, names: list[str], model: str
    ) -> "TextWeights":
        """Find the prefix under which a checkpoint has the text model's embeddings.

        If there are several, as in a model that also speaks, the text model is where the most
        tensors are that it has a place for, under the longest prefix of these.

        Parameters
        ----------
        skeleton : transformers.PreTrainedModel
        whole : transformers.PreTrainedConfig
            The configuration of the whole model.
        names : list of str
            The names of all tensors in the checkpoint.
        model : str
            What the message calls the model.

        Raises
        ------
        ValueError
            If there is no such prefix.
        """
        embeddings = next(
            f"{name}.weight"
            for name, module in skeleton.named_modules()
            if module is skeleton.get_input_embeddings()
        )
        of_whole = _transforms_of_whole(skeleton, whole)
        # Those of experts may be tens of thousands, and decide nothing.
        telling = [name for name in names if ".experts." not in name]
        renamed = cls(skeleton, of_whole, "").renamed(telling).values()
        prefixes = _prefixes(renamed, depth=embeddings.count(".") + 1)
        candidates = [cls(skeleton, of_whole, prefix) for prefix in prefixes]
        shapes = skeleton.state_dict()
        ranked = []
        for candidate in candidates:
            places = candidate.places(telling).values()
            if embeddings in places:
                n_fitting = sum(place in shapes for place in places)
                ranked.append((n_fitting, len(candidate.prefix), candidate))
        if not ranked:
            raise ValueError(
                f"model={model!r}: none of its {len(names)} tensors is named like {embeddings}, "
                f"the token embeddings of {type(skeleton).__name__}. Wanted: a checkpoint of the "
                "architecture that its config.json names."
            )
        return max(ranked, key=lambda rank: rank[:2])[-1]

    @cached_property
    def transforms(self) -> list[WeightTransform]:
        """All three steps, for transformers to carry them out while it reads the checkpoint."""
        prefix = re.escape(self.prefix)
        cut = [WeightRenaming(f"^(?!{prefix})", UNREAD), WeightRenaming(f"^{prefix}", "")]
        of_text = get_model_conversion_mapping(self.skeleton, add_legacy=False)
        return [*self.of_whole, *(cut if self.prefix else []), *of_text]

    def renamed(self, names: Iterable[str]) -> dict[str, str]:
        """Compute what transformers makes of names in the checkpoint."""
        renamings = [each for each in self.transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in self.transforms if isinstance(each, WeightConverter)]
        shapes, base = self.skeleton.state_dict(), self.skeleton.base_model_prefix
        return {
            name: rename_source_key(name, renamings, converters, base, shapes)[0] for name in names
        }

    def places(self, names: Iterable[str]) -> dict[str, str]:
        """Compute the names in the text model of those tensors that are in one of its modules."""
        children = dict(self.skeleton.named_children())
        renamed = self.renamed(names)
        return {name: new for name, new in renamed.items() if new.split(".")[0] in children}

    def readable_class(self) -> type[PreTrainedModel]:
        """Return a class like the text model's that can read the checkpoint of the whole model.

        transformers finds `transforms` by the name of the class.
        """
        text_class = type(self.skeleton)
        name = f"{text_class.__name__}InAnother"
        transforms: list[Any] = self.transforms
        register_checkpoint_conversion_mapping(name, transforms, overwrite=True)
        return type(name, (text_class,), {"__module__": text_class.__module__})

    def check_unread(self, unread: Iterable[str], model: str) -> None:
        """Raise ValueError if a tensor of the text model was left unread.

        Parameters
        ----------
        unread : iterable of str
            The names that transformers reports, changed as in `transforms`.
        model : str
            What the message calls the model.
        """
        children = dict(self.skeleton.named_children())
        lost = sorted(name for name in unread if name.split(".")[0] in children)
        if lost:
            raise ValueError(
                f"model={model!r}: {type(self.skeleton).__name__} has no place for {len(lost)} "
                f"tensors of its part of the checkpoint, e.g. {self.prefix + lost[0]!r}. Wanted: a "
                "checkpoint of the architecture that its config.json names."
            )


def _transforms_of_whole(
    skeleton: PreTrainedModel, whole: PreTrainedConfig
) -> list[WeightTransform]:
    """Return the changes of names that transformers knows for the class of a checkpoint."""
    if whole.model_type == skeleton.config.model_type:  # an encoder-decoder and its encoder
        return []
    for name in (*(whole.architectures or ()), whole.model_type):
        known = get_checkpoint_conversion_mapping(name)
        if known is not None:
            return known
    return []


def _prefixes(names: Iterable[str], depth: int) -> list[str]:
    """List what names begin with, up to one of their last dots, if no number is in it.

    The names have at most `depth` parts after it.
    """
    found = {""}
    for name in names:
        parts = name.split(".")
        for n_parts in range(max(0, len(parts) - depth), len(parts)):
            if not any(part.isdigit() for part in parts[:n_parts]):
                found.add("".join(f"{part}." for part in parts[:n_parts]))
    return sorted(found)
