"""`QLoRAClassifier`: the scikit-learn contract, and nothing of torch's internals."""

from typing import ClassVar

from sklearn.base import BaseEstimator, ClassifierMixin

from skqlora.prediction import PredictionMixin
from skqlora.saving import PersistenceMixin
from skqlora.settings.constraints import PARAMETER_CONSTRAINTS
from skqlora.text.inputs import (
    LabelledTexts,
    check_classes,
    check_labelled_texts,
    check_texts,
    check_validation,
    is_validation_given,
    refuse_other_classes,
)
from skqlora.training.callbacks import CALLBACK_ATTRIBUTES, CallbackSupportMixin, with_callbacks
from skqlora.training.epochs import fit_epochs, fit_piece

DOC_LINK = "https://skqlora.readthedocs.io/stable/generated/skqlora.{estimator_name}.html"


class QLoRAClassifier(
    PredictionMixin, PersistenceMixin, CallbackSupportMixin, ClassifierMixin, BaseEstimator
):
    r"""Text classifier that fine-tunes a 4-bit language model with QLoRA.

    `fit` loads the model in 4-bit NF4 with double quantization, adds low-rank adapters (LoRA) to
    every linear layer, trains them and a linear head with paged AdamW, and keeps only those. This
    is QLoRA (Dettmers et al., arXiv 2305.14314) behind the interface of scikit-learn.

    Parameters
    ----------
    model : str or path, default="Qwen/Qwen3-0.6B-Base"
        A model id of the Hugging Face Hub or a local folder: a text encoder (BERT, RoBERTa,
        DeBERTa, ModernBERT ...) or a decoder (Llama, Qwen, Mistral, Gemma, Phi, GPT-2 ...).
    revision : str, default=None
        Branch, tag or commit of the model on the Hub.
    quantization : {"nf4", "fp4"} or None, default="nf4"
        4-bit data type of the frozen base. None keeps it in `compute_dtype`: plain LoRA, for
        comparison.
    double_quant : bool, default=True
        Quantize the quantization constants too, which saves 0.37 bits a parameter.
    compute_dtype : {"auto", "bfloat16", "float16", "float32"}, default="auto"
        Of the products with the base's weights. "auto" is bfloat16 where the hardware multiplies
        it. Adapter and head are always float32.
    device : str, default="auto"
        A torch device; "auto" takes CUDA, then XPU, then the CPU. Where a base does not fit on the
        first of several GPUs, "auto" puts the rest of its layers on the next ones, which then
        compute in turn.
    attn_implementation : str, default=None
        Attention kernel, by transformers' name: "sdpa", "eager", "flash_attention_2" ... None
        leaves the choice to transformers.
    lora_r : int, default=16
        Rank of the adapters.
    lora_alpha : float, default=16
        LoRA's output is scaled by `lora_alpha / lora_r`.
    lora_dropout : float, default=0.05
        Share of LoRA's input features that is dropped in training, drawn once for each text and
        layer. No other dropout acts.
    target_modules : "all-linear", str or list of str, default="all-linear"
        Layers that get an adapter: all, those whose name matches a regular expression, or those
        whose name ends so.
    layers : "all", int or list of int, default="all"
        Of which of the model's layers: all, that many at the end, or those of these numbers. Few at
        the end are faster to train: no gradient is computed before the first of them.
    cache_dtype : "auto", "bfloat16" or None, default="auto"
        Layers before the first adapted one are computed once for each text, not in each epoch, and
        kept in this precision, "auto" their own: in a tenth of the free memory, and there for later
        fits, else in a file. None keeps nothing; nor do one epoch and `partial_fit`.
    use_rslora : bool, default=False
        Scale by `lora_alpha / sqrt(lora_r)` (arXiv 2312.03732).
    use_dora : bool, default=False
        Learn the weights' magnitudes apart from their directions (arXiv 2402.09353). Slower.
    init_lora_weights : True or "gaussian", default=True
        How LoRA's A starts: Kaiming uniform or Gaussian. B starts at zero.
    init_head_weights : {"normal", "probe", "class_names"}, default="normal"
        How the head starts: with small random numbers; at the cost of a prediction of the training
        texts, as a logistic regression on what the base gives untrained (arXiv 2202.10054), but
        for `partial_fit`, which takes the first; or, for a decoder and labels that are words, with
        its output embeddings of them, so that it begins with its own guess at what follows
        `prompt` (but for a bias, a scale or a cap that some families put on their logits).
    pooling : {"auto", "last", "mean", "cls", "pooler"}, default="auto"
        How the hidden states of a text become one vector. "auto" is the last token for a decoder
        and the mean for an encoder.
    max_length : int or "auto", default="auto"
        Greatest number of tokens of a text, special ones and those of `prompt` included. "auto" is
        512, or less if the model takes less.
    truncation : {"head", "tail", "head+tail", "windows"}, default="head"
        What is kept of a longer text: its head; its tail; a quarter of the room for the head and
        the rest for the tail (arXiv 1905.05583); or all, in windows. A text's logits are then the
        mean over its windows, each of which is trained on with the text's label and an equal part
        of its weight.
    stride : int, default=0
        Tokens that a window shares with the one before, at most half of it; the last window, which
        is as long as the others, may share more.
    prompt : str, default=None
        Template that a text is put into at its one ``{text}``, such as ``"{text}\nLabel:"``; it is
        never cut. Worth a try with decoders.
    num_train_epochs : int or "auto", default="auto"
        Passes over the training texts. "auto" is more for few texts: see Notes.
    batch_size : int, default=16
        Texts of the greatest length in one forward pass of training; of shorter ones more share a
        pass, where `gradient_accumulation_steps` asks for more.
    gradient_accumulation_steps : int, default=1
        Forward passes for one update. Only memory and time depend on how their product with
        `batch_size`, the texts of one update, is split.
    gradient_checkpointing : "auto" or bool, default="auto"
        Recompute activations instead of keeping them: less memory, about a third more time.
        "auto" does so where `skqlora.estimate_memory` says that the fit would not fit else.
    learning_rate : float or "auto", default="auto"
        Peak rate of LoRA. "auto" follows the width of the model: see Notes.
    head_learning_rate : float or "auto", default="auto"
        Peak rate of the head. "auto" is 10 times that of LoRA.
    weight_decay : float, default=0.0
        Share of each weight that is taken off in an update, times the learning rate.
    warmup_steps : int or float, default=0.1
        Updates over which the rate rises from 0; below 1, their share of all updates.
    lr_scheduler_type : str, default="linear"
        Course of the rates after the warm-up, as in `transformers.get_scheduler`: "linear",
        "cosine", "constant", "constant_with_warmup" or "inverse_sqrt".
    max_grad_norm : float or None, default=1.0
        The gradient is scaled down to this L2 norm. None leaves it.
    optim : {"paged_adamw_32bit", "paged_adamw_8bit", "adamw"}, default="paged_adamw_32bit"
        bitsandbytes' paged AdamW, whose state moves to the host when the GPU is full, or torch's.
    class_weight : dict, list of dict, "balanced" or None, default=None
        Weights of the classes, by label; a class that is left out has weight 1. For multilabel
        targets a list with a dict ``{0: weight, 1: weight}`` for each label. "balanced" is
        ``n_texts / (n_classes * count)``. They multiply `sample_weight`.
    early_stopping : bool, default=False
        Score held-out texts after each epoch, stop when that no longer rises, and keep the adapter
        of the best epoch, the last of equal ones; after `warm_start` the start is one too.
        `class_weight` does not enter the score.
    validation_fraction : float, default=0.1
        Share of the texts that early stopping holds out, in the classes' proportions, unless `fit`
        gets `X_val`. Each class keeps a text for training.
    n_iter_no_change : int, default=2
        Epochs in a row without a rise after which early stopping stops.
    tol : float, default=1e-4
        A rise of the score is more than this.
    scoring : str, callable or None, default=None
        What early stopping scores: a name or a callable as in scikit-learn, "loss" for the
        negative cross-entropy, None for `score`. With few held-out texts "loss" tells more, and
        for multilabel targets so do "f1_macro" and "average_precision": `score` wants all labels
        of a text right.
    warm_start : bool, default=False
        `fit` goes on from the fitted adapter, with a new optimizer and schedule; the classes must
        be the same. `n_iter_` and the curves go on too, and what is held out stays so, given the
        same texts.
    checkpoint_dir : str or path, default=None
        Where `fit` writes how far it is, in a folder for each fit, which it removes at its end. The
        same call, with an int as `random_state`, goes on from there after a kill and comes to the
        same result; on a CPU bit for bit, at the same number of threads.
    checkpoint_every : int, default=500
        Updates between two checkpoints: 3 times the adapter each, and for early stopping 4.
    random_state : int, RandomState instance or None, default=None
        Of the adapter's and head's first values, what is held out, the order of the texts and
        dropout. The global random states are neither used nor changed, but that None draws a seed
        from NumPy's.
    verbose : int, default=0
        1 shows progress bars: of the fit, and of downloading and loading a model.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted. For multilabel targets the numbers of their columns.
    multilabel_ : bool
        Whether a text has any number of labels.
    adapter_ : AdapterState
        The adapter and the head: megabytes, in NumPy arrays. The base is not part of the
        estimator: `predict` finds it in the process, or loads it.
    n_iter_ : int
        Epochs trained; calls of `partial_fit`.
    n_samples_seen_ : int
        Texts trained on, in all calls of `partial_fit`.
    loss_curve_ : list of float, of length n_epochs
        Mean training cross-entropy of each epoch, in nats; weighted as the training is.
    validation_scores_ : list of float, of length n_epochs, or None without early stopping
        Score of each epoch on the held-out texts; nan for those of an earlier fit without them.
    best_validation_score_ : float, or None without early stopping
        That of the adapter which was kept.
    optimizer_state_ : OptimizerState, or None but after `partial_fit`
        For the next `partial_fit`; twice the size of the adapter.
    footprint_ : Footprint
        Size of the base in memory, and of what was trained.

    Notes
    -----
    Texts in `X` are a list, a Series, an array of shape (n_texts,) or a table with one column.

    A process loads a base at the first `fit` or `predict` that needs it and keeps it for all
    estimators: see `skqlora.backbone_cache_info`. That costs the download from the Hub, then about
    0.5 bytes of memory for each parameter in a linear layer and 2 (GPU) or 4 (CPU) for each in the
    embeddings. Threads share it; each worker process loads its own.

    Where `torch.distributed` has a process group (`torchrun`), all its processes must call `fit`
    with the same texts. Each trains on its share of every batch, and all end with the same weights.

    ``learning_rate="auto"`` is half of ``5e-4 * (2000 / hidden_size) ** p`` with p = 0.0775 for
    Qwen and 0.781 for other models, the fit of "LoRA Without Regret" (Thinking Machines Lab, 2025)
    over Llama and Qwen models. The half was chosen by a sweep with one small encoder.

    ``num_train_epochs="auto"`` is as many as give 300 updates, but at least 3 and at most 20; a
    text counts once, however many windows it has.

    On a CPU, the same seed and number of threads give the same weights bit for bit.

    References
    ----------
    .. [1] Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
    .. [2] Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    Examples
    --------
    >>> from skqlora import QLoRAClassifier
    >>> texts = ["My card is lost", "When does my card arrive?"] * 10
    >>> labels = ["lost", "arrival"] * 10
    >>> clf = QLoRAClassifier("Qwen/Qwen3-0.6B-Base", random_state=0).fit(texts, labels)
    >>> clf.predict(["My card is lost"])
    array(['lost'], dtype='<U7')
    >>> clf.predict_proba(["My card is lost"]).shape
    (1, 2)
    """

    _doc_link_module = "skqlora"
    _doc_link_template = DOC_LINK

    _parameter_constraints: ClassVar[dict[str, list]] = PARAMETER_CONSTRAINTS

    def __init__(
        self,
        model="Qwen/Qwen3-0.6B-Base",
        *,
        revision=None,
        quantization="nf4",
        double_quant=True,
        compute_dtype="auto",
        device="auto",
        attn_implementation=None,
        lora_r=16,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules="all-linear",
        layers="all",
        cache_dtype="auto",
        use_rslora=False,
        use_dora=False,
        init_lora_weights=True,
        init_head_weights="normal",
        pooling="auto",
        max_length="auto",
        truncation="head",
        stride=0,
        prompt=None,
        num_train_epochs="auto",
        batch_size=16,
        gradient_accumulation_steps=1,
        gradient_checkpointing="auto",
        learning_rate="auto",
        head_learning_rate="auto",
        weight_decay=0.0,
        warmup_steps=0.1,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        optim="paged_adamw_32bit",
        class_weight=None,
        early_stopping=False,
        validation_fraction=0.1,
        n_iter_no_change=2,
        tol=1e-4,
        scoring=None,
        warm_start=False,
        checkpoint_dir=None,
        checkpoint_every=500,
        random_state=None,
        verbose=0,
    ):
        self.model = model
        self.revision = revision
        self.quantization = quantization
        self.double_quant = double_quant
        self.compute_dtype = compute_dtype
        self.device = device
        self.attn_implementation = attn_implementation
        self.lora_r = lora_r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.target_modules = target_modules
        self.layers = layers
        self.cache_dtype = cache_dtype
        self.use_rslora = use_rslora
        self.use_dora = use_dora
        self.init_lora_weights = init_lora_weights
        self.init_head_weights = init_head_weights
        self.pooling = pooling
        self.max_length = max_length
        self.truncation = truncation
        self.stride = stride
        self.prompt = prompt
        self.num_train_epochs = num_train_epochs
        self.batch_size = batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.gradient_checkpointing = gradient_checkpointing
        self.learning_rate = learning_rate
        self.head_learning_rate = head_learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.lr_scheduler_type = lr_scheduler_type
        self.max_grad_norm = max_grad_norm
        self.optim = optim
        self.class_weight = class_weight
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.scoring = scoring
        self.warm_start = warm_start
        self.checkpoint_dir = checkpoint_dir
        self.checkpoint_every = checkpoint_every
        self.random_state = random_state
        self.verbose = verbose

    @with_callbacks
    def fit(self, X, y, sample_weight=None, *, X_val=None, y_val=None, sample_weight_val=None):
        """Fine-tune the model on texts and their labels.

        Parameters
        ----------
        X : list, Series or array of str, of shape (n_texts,), or a table with one column
            Texts.
        y : array-like of shape (n_texts,), or array-like or sparse matrix of shape \
                (n_texts, n_labels)
            Labels, of two classes or more; or a multilabel indicator of 0 and 1.
        sample_weight : array-like of shape (n_texts,), default=None
            What each text counts in the loss. A text of weight 0 is left out.
        X_val, y_val : like `X` and `y`, default=None
            What early stopping scores, instead of a part of `X`. Within a `Pipeline` its
            ``transform_input=["X_val"]`` sends them through the steps before. scikit-learn's
            searches cut whatever is as long as `X` into folds: do not pass as many validation
            texts as texts.
        sample_weight_val : array-like of shape (n_validation_texts,), default=None
            Weights in that score.

        Returns
        -------
        self : QLoRAClassifier
            The estimator itself, fitted.

        Raises
        ------
        ValueError, TypeError
            For input or parameters that cannot work; before a model is loaded where that is
            possible to tell.
        MemoryError
            If not even the smallest passes would fit: with what would take how much. No model is
            loaded then.
        FloatingPointError
            If the training diverges. Then the classifier is that of the last epoch before, if
            there is one: `n_iter_` says.
        RuntimeError
            In a fork of a process that has computed on threads; in two threads of one process of a
            `torch.distributed` group.
        """
        self._validate_params()
        table = check_labelled_texts(self._check_texts(X, reset=True), y, sample_weight)
        held_out = self._check_validation(table, X_val, y_val, sample_weight_val)
        goes_on = self.warm_start and hasattr(self, "adapter_")
        if goes_on:
            refuse_other_classes(table, self.classes_, self.multilabel_)
        # Kept all at once and at the end: a failure leaves an older fit as it was.
        fit_epochs(self, table, held_out, goes_on=goes_on, keep=self.__dict__.update)
        return self

    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Train one epoch on one piece of the data, going on from what was fitted before.

        The optimizer goes on too. The learning rates do not decay, since nobody knows how much is
        to come; a `warmup_steps` below 1 is none. Callbacks are not told.

        Parameters
        ----------
        X : list, Series or array of str, of shape (n_texts,), or a table with one column
            Texts.
        y : array-like of shape (n_texts,), or array-like or sparse matrix of shape \
                (n_texts, n_labels)
            Labels, all of them among `classes`.
        classes : array-like of shape (n_classes,), default=None
            All labels that will come; for multilabel targets the numbers of the columns. Needed at
            the first call, and no other ones may be given later.
        sample_weight : array-like of shape (n_texts,), default=None
            What each text counts in the loss.

        Returns
        -------
        self : QLoRAClassifier
            The estimator itself, fitted.

        Raises
        ------
        ValueError, TypeError
            As `fit`; if `classes` is missing, or `y` has other ones; if `early_stopping` or
            ``class_weight="balanced"`` is set, which would need all data at once.
        """
        self._validate_params()
        for name, value in [("early_stopping", True), ("class_weight", "balanced")]:
            if getattr(self, name) == value:
                raise ValueError(
                    f"partial_fit does not support {name}={value!r}, which needs all data at once. "
                    "Wanted: fit, or another value (for class weights a dict of numbers)."
                )
        goes_on = hasattr(self, "adapter_")
        known = check_classes(classes, self.classes_ if goes_on else None)
        texts = self._check_texts(X, reset=not goes_on)
        table = check_labelled_texts(texts, y, sample_weight, known)
        if goes_on:
            refuse_other_classes(table, self.classes_, self.multilabel_)
        self.__dict__.update(fit_piece(self, table, goes_on=goes_on))
        return self

    def _check_texts(self, X, *, reset: bool, name: str = "X") -> list[str]:
        """Turn `X` into texts; `reset` says whether what is seen in it is to be remembered."""
        return check_texts(X, name)

    def _check_validation(self, training, X_val, y_val, sample_weight_val) -> LabelledTexts | None:
        """Check what early stopping scores as what is trained on."""
        if not is_validation_given(X_val, y_val, sample_weight_val, self.early_stopping):
            return None
        texts = self._check_texts(X_val, reset=False, name="X_val")
        return check_validation(texts, y_val, sample_weight_val, training)

    def __getstate__(self):
        """Leave callbacks out of a fitted estimator; on the way to a worker they are needed."""
        state = super().__getstate__()
        if "adapter_" in state:
            state = {key: value for key, value in state.items() if key not in CALLBACK_ATTRIBUTES}
        return state

    def __sklearn_tags__(self):
        """Tell scikit-learn that `X` is one-dimensional text, and `y` may be multilabel."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags
