"""Whether a fit fits into the memory that is free, decided before a base is loaded."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from skqlora.memory.estimate import MemoryEstimate, estimate_training
from skqlora.model.lora import resolve_lora
from skqlora.model.spec import BackboneSpec
from skqlora.settings.adapter_settings import LoraSettings
from skqlora.settings.parameters import Parameters
from skqlora.settings.settings import resolve_max_length
from skqlora.text.batches import largest_pass
from skqlora.text.tokenization import load_tokenizer

AUTO_SHARE = 0.9  # of the memory that is there; what would take more is checkpointed
REFUSED_SHARE = 1.25  # of it; an estimate may be above what a fit takes by a quarter


@dataclass(frozen=True)
class PlannedFit:
    """A fit that has not begun: what its memory depends on.

    Attributes
    ----------
    parameters : Parameters
    spec : BackboneSpec
        Its device need not be there.
    skeleton : transformers.PreTrainedModel
        The model on the meta device.
    lora : LoraSettings
    n_classes : int
    n_tokens : int
        Tokens of the longest text, padding included.
    """

    parameters: Parameters
    spec: BackboneSpec
    skeleton: PreTrainedModel
    lora: LoraSettings
    n_classes: int
    n_tokens: int

    @property
    def n_texts(self) -> int:
        """Number of the longest texts in the largest pass."""
        on_cpu = self.spec.device.type == "cpu"
        return largest_pass(self.parameters.batch_size, self.n_tokens, on_cpu=on_cpu)

    def estimate(self, *, checkpointing: bool, n_texts: int | None = None) -> MemoryEstimate:
        """Estimate the memory of the fit at its peak, or with fewer texts in a pass."""
        parameters = self.parameters
        return estimate_training(
            self.skeleton,
            self.spec,
            self.lora,
            optim=parameters.optim,
            n_classes=self.n_classes,
            n_texts=self.n_texts if n_texts is None else n_texts,
            n_tokens=self.n_tokens,
            dropout=parameters.lora_dropout > 0,
            keep_pooler=parameters.pooling == "pooler",
            checkpointing=checkpointing,
            batch_rows=parameters.batch_rows,
        )


def estimate_fit(parameters: Parameters, n_classes: int) -> MemoryEstimate:
    """Estimate what a fit takes whose texts are as long as its parameters let them be.

    Parameters
    ----------
    parameters : Parameters
        Their device need not be there; "auto" checkpointing counts as none.
    n_classes : int

    Returns
    -------
    estimate : MemoryEstimate
    """
    spec = BackboneSpec.of(parameters, here=False)
    architecture = spec.architecture(progress_bars=bool(parameters.verbose))
    lora = resolve_lora(parameters, architecture.skeleton)
    tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
    n_tokens = resolve_max_length(parameters, architecture.max_length(tokenizer.max_length))
    planned = PlannedFit(parameters, spec, architecture.skeleton, lora, n_classes, n_tokens)
    return planned.estimate(checkpointing=parameters.gradient_checkpointing is True)


def fits(estimate: MemoryEstimate, free: float) -> bool:
    """Tell whether so many free bytes are enough, with a little to spare."""
    return estimate.resident <= AUTO_SHARE * free


def choose_checkpointing(planned: PlannedFit, free: float) -> bool:
    """Decide whether activations are computed again, and refuse a fit that cannot fit.

    Parameters
    ----------
    planned : PlannedFit
    free : float
        The bytes of its device that there are for all of the training.

    Returns
    -------
    checkpointing : bool
        As the user asks for; "auto" only if the fit would not fit otherwise.

    Raises
    ------
    MemoryError
        If it cannot fit even so: the estimate is a quarter above what there is. On a GPU the
        estimate is of one text a pass, to which a training that runs out of memory goes down.
    """
    wanted, device = planned.parameters.gradient_checkpointing, planned.spec.device
    if fits(planned.estimate(checkpointing=wanted is True), free):
        return wanted is True
    checkpointing = bool(wanted)
    least = planned.estimate(
        n_texts=planned.n_texts if device.type == "cpu" else 1, checkpointing=checkpointing
    )
    if least.resident > REFUSED_SHARE * free:
        remedies = [] if checkpointing else ["gradient_checkpointing=True"]
        if least.n_texts > 1:
            remedies.append(f"batch_size below {least.n_texts}")
        raise MemoryError(
            f"The fit would take at least\n{least}\nand {device} has {free / 1e6:,.1f} MB for it, "
            f"a loaded base included. Pass {', '.join([*remedies, 'layers=1'])}, or a "
            "smaller max_length or model; or free what other programs hold."
        )
    return wanted is True or least.gradient_checkpointing
