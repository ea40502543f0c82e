"""The memory that a fit will take, estimated before the fit."""

from numbers import Integral

from sklearn.utils.validation import check_scalar

from skqlora._utils.libraries import import_libraries
from skqlora._utils.torch_state import plain_torch
from skqlora.classifier import QLoRAClassifier
from skqlora.regressor import QLoRARegressor
from skqlora.settings.parameters import read_parameters


@plain_torch()
def estimate_memory(model="Qwen/Qwen3-0.6B-Base", *, n_classes=2, **params):
    """Estimate the memory that a fit takes at its peak, from the model's shapes alone.

    Only the configuration and the tokenizer of the model are read, not its weights, and the device
    need not be present. `fit` itself looks at such an estimate before it loads a model.

    Parameters
    ----------
    model : str or path-like, default="Qwen/Qwen3-0.6B-Base"
        The id of a model on the Hub, or a local folder.
    n_classes : int, default=2
        The number of outputs of the head: classes, labels of a multilabel table, or numbers.
    **params
        The parameters of `QLoRAClassifier` or `QLoRARegressor`, with its defaults. Pass
        ``**clf.get_params()`` for those of an estimator. Texts count as `max_length` tokens long,
        and `batch_size` of them share a pass. On a CPU no more than 2,048 tokens do, because that
        is faster, so that there only a small `batch_size` matters.
        With ``gradient_checkpointing="auto"`` there are two totals: `fit` computes activations
        again if the fit would not fit into memory otherwise.

    Returns
    -------
    estimate : MemoryEstimate
        The numbers of bytes: `base`, `adapter`, `gradients`, `optimizer`, `activations`,
        `workspace`, their `total`, `total_checkpointed`, which is that with activations computed
        again, and `resident`, which leaves out an optimizer state that may be paged to the host.
        Printing the estimate shows a table. Only tensors are counted. On a GPU
        the CUDA context adds 0.3 to 0.6 GB; on a CPU the process, its libraries and their caches
        add 1 GB and more.

    Raises
    ------
    ValueError, TypeError
        If `fit` would refuse the model or the parameters too.
    RuntimeError
        If the model's computation depends on values, so that shapes do not determine its memory.

    See Also
    --------
    QLoRAClassifier : Has the size of the loaded base in `footprint_` after a fit.
    QLoRARegressor : The same for numbers instead of classes.
    backbone_cache_info : Return the size of the bases that are loaded now.

    Notes
    -----
    Packed weights and their constants are counted as bitsandbytes lays them out (QLoRA [1]_,
    section 3), the adapter as PEFT does, and the optimizer's moments by its kind. Activations are
    the tensors that autograd keeps when the model, with its adapter, runs on torch's meta device.

    References
    ----------
    .. [1] Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.

    Examples
    --------
    >>> from skqlora import estimate_memory
    >>> print(estimate_memory("Qwen/Qwen3-0.6B-Base", batch_size=4, max_length=512, device="cuda"))
    base                                           538.5 MB
    adapter and head                                40.4 MB
    their gradients                                 40.4 MB
    optimizer, paged                                80.8 MB
    activations of 4 x 512 tokens                3,273.1 MB
    workspace                                       72.6 MB
    total                                        4,045.7 MB
    total, if activations are computed again     1,019.5 MB
    """
    kind = QLoRARegressor if "loss" in params else QLoRAClassifier
    check_scalar(n_classes, "n_classes", Integral, min_val=1 if kind is QLoRARegressor else 2)
    clf = kind(model, **params)
    clf._validate_params()
    import_libraries()
    from skqlora.memory.planning import estimate_fit

    return estimate_fit(read_parameters(clf), n_classes)
