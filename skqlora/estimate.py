"""What a fit will take, for a user to ask before it."""

from skqlora.classifier import QLoRAClassifier
from skqlora.quiet import import_libraries


def estimate_memory(model="Qwen/Qwen3-0.6B-Base", *, n_classes=2, **params):
    """Estimate the memory that a fit takes at its peak, from the model's configuration alone.

    No weights are read, and the device need not be there. It is what `fit` itself looks at before
    it loads a model.

    Parameters
    ----------
    model : str or path-like, default="Qwen/Qwen3-0.6B-Base"
        A Hub id or a local folder.
    n_classes : int, default=2
    **params
        Parameters of `QLoRAClassifier`, with its defaults. ``batch_size`` and ``max_length`` are
        the shape of a pass: texts as long as they may be. ``gradient_checkpointing="auto"`` counts
        as False here; `fit` turns it on where that would not fit.

    Returns
    -------
    estimate : MemoryEstimate
        Bytes by what takes them; printed, a table. On a GPU without the CUDA context of 0.3 to 0.6
        GB, on a CPU without the libraries' own 0.5 to 1 GB.

    Raises
    ------
    ValueError, TypeError
        For a model or parameters that `fit` would refuse, too.
    RuntimeError
        If what the model does depends on values, so that shapes do not tell its memory.

    Notes
    -----
    Packed weights and their constants are counted as bitsandbytes lays them out (QLoRA [1]_,
    section 3), the adapter as PEFT does, the optimizer's moments by its kind. Activations are the
    tensors that autograd keeps when the model, with its adapter, runs on torch's meta device.

    References
    ----------
    .. [1] Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.

    Examples
    --------
    >>> from skqlora import estimate_memory
    >>> print(estimate_memory(device="cuda", batch_size=4, max_length=512))  # doctest: +SKIP
    """
    clf = QLoRAClassifier(model, **params)
    clf._validate_params()
    import_libraries()
    from skqlora.finetuning import estimate_fit

    return estimate_fit(clf, n_classes)
