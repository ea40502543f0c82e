"""Whether a fit fits into the memory that is free, decided before a base is loaded."""

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from skqlora.checkpoint.spec import BackboneSpec
from skqlora.memory.estimate import MemoryEstimate, estimate_training
from skqlora.model.lora import resolve_lora
from skqlora.settings.adapter_settings import LoraSettings
from skqlora.settings.parameters import Parameters
from skqlora.settings.settings import resolve_max_length
from skqlora.text.tokenization import load_tokenizer

# The share of the free memory above which "auto" checkpoints a fit.
AUTO_SHARE = 0.9
# The share of the free memory above which a fit is refused. It is above 1 because an estimate may
# exceed what a fit takes by a quarter.
REFUSED_SHARE = 1.25

CPU_TRAINING_TOKENS = 2048  # the most tokens in a padded pass on a CPU: the fastest on two cores


@dataclass(frozen=True)
class PlannedFit:
    """A fit that has not begun yet, with everything that its memory depends on.

    Attributes
    ----------
    parameters : Parameters
    spec : BackboneSpec
        The specification of the base, whose device need not be on this machine.
    skeleton : transformers.PreTrainedModel
        The model on the meta device.
    lora : LoraSettings
    n_outputs : int
    n_tokens : int
        The number of tokens of the longest text, padding included.
    """

    parameters: Parameters
    spec: BackboneSpec
    skeleton: PreTrainedModel
    lora: LoraSettings
    n_outputs: int
    n_tokens: int

    @property
    def n_texts(self) -> int:
        """The number of texts in the largest pass, all as long as the longest text."""
        on_cpu = self.spec.device.type == "cpu"
        return largest_pass(self.parameters.batch_size, self.n_tokens, on_cpu=on_cpu)

    def estimate(self, *, checkpointing: bool, n_texts: int | None = None) -> MemoryEstimate:
        """Estimate the fit's memory at its peak, optionally with fewer texts in a pass."""
        parameters = self.parameters
        return estimate_training(
            self.skeleton,
            self.spec,
            self.lora,
            optim=parameters.optim,
            n_outputs=self.n_outputs,
            n_texts=self.n_texts if n_texts is None else n_texts,
            n_tokens=self.n_tokens,
            dropout=parameters.lora_dropout > 0,
            keep_pooler=parameters.pooling == "pooler",
            checkpointing=checkpointing,
        )


def largest_pass(batch_size: int, longest: int, *, on_cpu: bool) -> int:
    """Compute how many texts of the greatest length share a forward pass of a training.

    Parameters
    ----------
    batch_size : int
        The greatest number of texts that may share a pass.
    longest : int
        The number of tokens of each text.
    on_cpu : bool
        Whether the training is on a CPU, where fewer long texts share a pass, which is faster.

    Returns
    -------
    n_texts : int
    """
    if on_cpu:
        return min(batch_size, max(1, CPU_TRAINING_TOKENS // longest))
    return batch_size


def estimate_fit(parameters: Parameters, n_outputs: int) -> MemoryEstimate:
    """Estimate the memory of a fit whose texts are as long as its parameters allow.

    Parameters
    ----------
    parameters : Parameters
        The parameters of the fit. Their device need not be on this machine. With "auto"
        checkpointing the estimate is without it, and has the total with it as well.
    n_outputs : int

    Returns
    -------
    estimate : MemoryEstimate
    """
    spec = BackboneSpec.of(parameters, here=False)
    architecture = spec.architecture(progress_bars=bool(parameters.verbose))
    lora = resolve_lora(parameters, architecture.skeleton)
    tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
    n_tokens = resolve_max_length(parameters, architecture.max_length(tokenizer.max_length))
    planned = PlannedFit(parameters, spec, architecture.skeleton, lora, n_outputs, n_tokens)
    asked = parameters.gradient_checkpointing
    estimate = planned.estimate(checkpointing=asked is True)
    if asked != "auto":
        return estimate
    least = planned.estimate(checkpointing=True)
    again = least.total if least.gradient_checkpointing else None
    return replace(estimate, total_checkpointed=again)


def fits(estimate: MemoryEstimate, free: float) -> bool:
    """Check whether the free bytes are enough for a fit, with a little to spare."""
    return estimate.resident <= AUTO_SHARE * free


def choose_checkpointing(planned: PlannedFit, free: float) -> bool:
    """Decide whether activations are computed again, and refuse a fit that is too large.

    Parameters
    ----------
    planned : PlannedFit
    free : float
        The bytes on its device that the whole training may take, a loaded base included.

    Returns
    -------
    checkpointing : bool
        What the user asks for. "auto" becomes True only if the fit would not fit otherwise.

    Raises
    ------
    MemoryError
        If the fit cannot fit even so, because its estimate is more than a quarter above `free`. On
        a GPU this estimate is for one text in a pass, since a training that runs out of memory
        reduces its passes down to this.
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
