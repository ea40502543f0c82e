"""What a fit will take, for a user to ask before it."""

from numbers import Integral

from sklearn.utils.validation import check_scalar

from skqlora._utils.libraries import import_libraries
from skqlora.classifier import QLoRAClassifier


def estimate_memory(model="Qwen/Qwen3-0.6B-Base", *, n_classes=2, **params):
    """Estimate the memory that a fit takes at its peak, from the model's shapes alone.

    Of the model only the configuration and the tokenizer are read, no weights, and the device need
    not be there. It is what `fit` itself looks at before it loads a model.

    Parameters
    ----------
    model : str or path-like, default="Qwen/Qwen3-0.6B-Base"
        A Hub id or a local folder.
    n_classes : int, default=2
        Outputs of the head: classes, or labels of a multilabel table.
    **params
        Parameters of `QLoRAClassifier`, with its defaults: those of an estimator are
        ``**clf.get_params()``. Texts count as `max_length` tokens long, and `batch_size` of them
        share a pass; on a CPU no more than 2,048 tokens do, which is faster, so that there only a
        small `batch_size` matters. ``gradient_checkpointing="auto"`` counts as False here; `fit`
        turns it on where that would not fit.

    Returns
    -------
    estimate : MemoryEstimate
        Bytes: `base`, `adapter`, `gradients`, `optimizer`, `activations`, `workspace`, their
        `total`, and `resident`, which leaves out an optimizer state that may be paged to the host.
        Printed, a table. It is what tensors take. On a GPU the CUDA context comes on top, 0.3 to
        0.6 GB; on a CPU what the process, its libraries and their caches take, 1 GB and more.

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
    >>> print(estimate_memory("Qwen/Qwen3-0.6B-Base", batch_size=4, max_length=512, device="cuda"))
    base                                538.5 MB
    adapter and head                     40.4 MB
    their gradients                      40.4 MB
    optimizer, paged                     80.8 MB
    activations of 4 x 512 tokens     4,451.4 MB
    workspace                            78.7 MB
    total                             5,230.1 MB
    """
    check_scalar(n_classes, "n_classes", Integral, min_val=2)
    clf = QLoRAClassifier(model, **params)
    clf._validate_params()
    import_libraries()
    from skqlora.memory.planning import estimate_fit

    return estimate_fit(clf._typed_parameters, n_classes)
