"""`QLoRAClassifier`: the scikit-learn contract, and nothing of torch's internals."""

import os
from numbers import Integral, Real
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, Options, StrOptions
from sklearn.utils.extmath import softmax
from sklearn.utils.validation import check_is_fitted

from skqlora.adapter import LoraSettings
from skqlora.inputs import check_labels, check_texts
from skqlora.quiet import import_libraries, muted

if TYPE_CHECKING:  # torch and transformers load at first use
    from skqlora.backbone import BackboneSpec
    from skqlora.training import TrainingSettings

AUTO_MAX_LENGTH = 512  # tokens
HEAD_RATE_FACTOR = 5.0  # of the head's learning rate over LoRA's
SCHEDULES = {"linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"}


class QLoRAClassifier(ClassifierMixin, BaseEstimator):
    """Text classifier that fine-tunes a 4-bit language model with QLoRA.

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
    use_rslora : bool, default=False
        Scale by `lora_alpha / sqrt(lora_r)` (arXiv 2312.03732).
    use_dora : bool, default=False
        Learn the weights' magnitudes apart from their directions (arXiv 2402.09353). Slower.
    init_lora_weights : True or "gaussian", default=True
        How LoRA's A starts: Kaiming uniform or Gaussian. B starts at zero.
    pooling : {"auto", "last", "mean", "cls", "pooler"}, default="auto"
        How the hidden states of a text become one vector. "auto" is the last token for a decoder
        and the mean for an encoder.
    max_length : int or "auto", default="auto"
        Greatest number of tokens of a text; the end of a longer one is cut off, whatever the
        tokenizer's `truncation_side`. "auto" is 512, or less if the model takes less.
    num_train_epochs : int, default=5
        Passes over the training texts.
    batch_size : int, default=16
        Texts in one forward pass of training.
    gradient_accumulation_steps : int, default=1
        Forward passes for one update. Only memory and time depend on how their product with
        `batch_size`, the texts of one update, is split.
    gradient_checkpointing : "auto" or bool, default="auto"
        Recompute activations instead of keeping them: less memory, about a third more time.
        "auto" does so on a GPU if they would take over half of the free memory.
    learning_rate : float or "auto", default="auto"
        Peak rate of LoRA. "auto" follows the width of the model: see Notes.
    head_learning_rate : float or "auto", default="auto"
        Peak rate of the head. "auto" is 5 times that of LoRA.
    weight_decay : float, default=0.0
    warmup_steps : int or float, default=0.1
        Updates over which the rate rises from 0; below 1, their share of all updates.
    lr_scheduler_type : {"linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"}, \
            default="linear"
        Course of the rates after the warm-up, as in `transformers.get_scheduler`.
    max_grad_norm : float or None, default=1.0
        The gradient is scaled down to this L2 norm. None leaves it.
    optim : {"paged_adamw_32bit", "paged_adamw_8bit", "adamw"}, default="paged_adamw_32bit"
        bitsandbytes' paged AdamW, whose state moves to the host when the GPU is full, or torch's.
    random_state : int, RandomState instance or None, default=None
        Of the adapter's and head's first values, the order of the texts and dropout. The global
        random states are neither used nor changed, but that None draws a seed from NumPy's.
    verbose : int, default=0
        1 shows progress bars: of the fit, and of downloading and loading a model.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted.
    adapter_ : AdapterState
        The adapter and the head: megabytes, in NumPy arrays. The base is not part of the
        estimator: `predict` finds it in the process, or loads it.
    n_iter_ : int
        Epochs trained.
    loss_curve_ : list of float, of length n_iter_
        Mean training cross-entropy of each epoch, in nats.
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

    ``learning_rate="auto"`` is ``5e-4 * (2000 / hidden_size) ** p`` with p = 0.0775 for Qwen and
    0.781 for other models, the fit of "LoRA Without Regret" (Thinking Machines Lab, 2025) over
    Llama and Qwen models.

    On a CPU, the same seed and number of threads give the same weights bit for bit.

    References
    ----------
    .. [1] Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
    .. [2] Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    Examples
    --------
    >>> from skqlora import QLoRAClassifier
    >>> clf = QLoRAClassifier(random_state=0)
    >>> clf.fit(texts, labels)  # doctest: +SKIP
    >>> clf.predict(["Where is my card?"])  # doctest: +SKIP
    array(['card_arrival'], dtype=object)
    """

    _parameter_constraints: ClassVar[dict[str, list]] = {
        "model": [str, os.PathLike],
        "revision": [str, None],
        "quantization": [StrOptions({"nf4", "fp4"}), None],
        "double_quant": ["boolean"],
        "compute_dtype": [StrOptions({"auto", "bfloat16", "float16", "float32"})],
        "device": [str],
        "attn_implementation": [str, None],
        "lora_r": [Interval(Integral, 1, None, closed="left")],
        "lora_alpha": [Interval(Real, 0, None, closed="neither")],
        "lora_dropout": [Interval(Real, 0, 1, closed="left")],
        "target_modules": [str, list, tuple],
        "use_rslora": ["boolean"],
        "use_dora": ["boolean"],
        # Other starts of PEFT write to the base, which is shared.
        "init_lora_weights": [Options(bool, {True}), StrOptions({"gaussian"})],
        "pooling": [StrOptions({"auto", "last", "mean", "cls", "pooler"})],
        "max_length": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "num_train_epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "gradient_accumulation_steps": [Interval(Integral, 1, None, closed="left")],
        "gradient_checkpointing": [StrOptions({"auto"}), "boolean"],
        "learning_rate": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "head_learning_rate": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "warmup_steps": [Interval(Real, 0, None, closed="left")],
        "lr_scheduler_type": [StrOptions(SCHEDULES)],
        "max_grad_norm": [Interval(Real, 0, None, closed="neither"), None],
        "optim": [StrOptions({"paged_adamw_32bit", "paged_adamw_8bit", "adamw"})],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

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
        use_rslora=False,
        use_dora=False,
        init_lora_weights=True,
        pooling="auto",
        max_length="auto",
        num_train_epochs=5,
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
        self.use_rslora = use_rslora
        self.use_dora = use_dora
        self.init_lora_weights = init_lora_weights
        self.pooling = pooling
        self.max_length = max_length
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
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X, y):
        """Fine-tune the model on texts and their labels.

        Parameters
        ----------
        X : list, Series or array of str, of shape (n_texts,), or a table with one column
        y : array-like of shape (n_texts,)
            Labels, of two classes or more.

        Returns
        -------
        self : QLoRAClassifier

        Raises
        ------
        ValueError, TypeError
            For input or parameters that cannot work; before a model is loaded where that is
            possible to tell.
        FloatingPointError
            If the training diverges.
        RuntimeError
            In a fork of a process that has computed on threads; in two threads of one process of a
            `torch.distributed` group.
        """
        self._validate_params()
        texts = check_texts(X)
        classes, targets = check_labels(y, n_texts=len(texts))

        import_libraries()
        from skqlora.architecture import check_architecture
        from skqlora.cache import get_backbone
        from skqlora.clones import refuse_missing_targets
        from skqlora.distributed import Ranks
        from skqlora.model import TextClassifierModel
        from skqlora.processes import refuse_fork_of_threads
        from skqlora.tokenization import load_tokenizer
        from skqlora.training import train

        refuse_fork_of_threads()
        spec, lora = self._backbone_spec(), self._lora_settings()
        with muted(progress_bars=bool(self.verbose)):
            architecture = check_architecture(
                spec.model,
                spec.revision,
                quantized=spec.quantization is not None,
                attn_implementation=spec.attn_implementation,
                files=spec.files,
            )
            refuse_missing_targets(lora.target_modules, architecture.skeleton)
        tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
        max_length = self._choose_max_length(architecture.max_positions, tokenizer.max_length)
        tokens = tokenizer.tokenize(texts, max_length, architecture.vocab_size)

        backbone = get_backbone(spec, verbose=bool(self.verbose))
        recipe = self._training_settings(architecture.model_type, backbone.hidden_size)
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        ranks = Ranks.current()
        with ranks.one_fit_at_a_time():
            seed = ranks.agree(
                seed,
                (texts, classes.tolist(), targets.tolist()),
                (lora, recipe, self.lora_dropout, self.pooling, max_length),
                (backbone.fingerprint, spec.quantization, spec.double_quant, spec.compute_dtype),
            )
            with TextClassifierModel.fresh(
                backbone,
                lora,
                n_classes=len(classes),
                pooling=self.pooling,
                seed=seed,
                lora_dropout=self.lora_dropout,
            ) as model:
                loss_curve = train(model, tokens, targets, recipe, seed=seed, verbose=self.verbose)
                adapter = model.capture(max_length)
                footprint = backbone.footprint(model.count_trainable())

        # Only now, so that a failure leaves an older fit as it was.
        self.classes_ = classes
        self.adapter_ = adapter
        self.n_iter_ = len(loss_curve)
        self.loss_curve_ = loss_curve
        self.footprint_ = footprint
        return self

    def predict(self, X):
        """Predict the label of each text.

        Parameters
        ----------
        X : list, Series or array of str, of shape (n_texts,), or a table with one column

        Returns
        -------
        labels : ndarray of shape (n_texts,)
            In the dtype of the labels that were fitted.
        """
        logits = self._logits(X)
        return self.classes_[logits.argmax(axis=1)]

    def predict_proba(self, X):
        """Predict the probability of each class.

        Parameters
        ----------
        X : list, Series or array of str, of shape (n_texts,), or a table with one column

        Returns
        -------
        probabilities : ndarray of shape (n_texts, n_classes)
            The softmax of the logits, in the order of `classes_`.
        """
        return softmax(self._logits(X))

    def predict_log_proba(self, X):
        """Predict the logarithm of the probability of each class.

        Parameters
        ----------
        X : list, Series or array of str, of shape (n_texts,), or a table with one column

        Returns
        -------
        log_probabilities : ndarray of shape (n_texts, n_classes)
        """
        logits = self._logits(X)
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    def decision_function(self, X):
        """Compute the logits of each class.

        Parameters
        ----------
        X : list, Series or array of str, of shape (n_texts,), or a table with one column

        Returns
        -------
        scores : ndarray of shape (n_texts, n_classes), or (n_texts,) for two classes
            For two classes the second's logit less the first's, so that positive means
            ``classes_[1]``.
        """
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def _logits(self, X) -> np.ndarray:
        """Logits of shape (n_texts, n_classes), from the base of the process and the adapter."""
        check_is_fitted(self)
        self._validate_params()
        texts = check_texts(X)

        import_libraries()
        from skqlora.cache import get_backbone
        from skqlora.model import TextClassifierModel
        from skqlora.processes import refuse_fork_of_threads
        from skqlora.tokenization import load_tokenizer
        from skqlora.training import predict_logits

        refuse_fork_of_threads()
        spec = self._backbone_spec()
        backbone = get_backbone(spec, verbose=bool(self.verbose))
        tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
        tokens = tokenizer.tokenize(texts, self.adapter_.max_length, backbone.vocab_size)
        with TextClassifierModel.restored(backbone, self.adapter_) as model:
            return predict_logits(model, tokens)

    def _backbone_spec(self) -> "BackboneSpec":
        from skqlora.backbone import BackboneSpec, describe_files
        from skqlora.device import may_spread, resolve_compute_dtype, resolve_device

        device = resolve_device(self.device)
        model = os.fspath(self.model)
        files = describe_files(model)
        return BackboneSpec(
            model=str(files[0]) if files else model,  # one base for all ways to write a path
            revision=self.revision,
            quantization=self.quantization,
            double_quant=bool(self.double_quant) and self.quantization is not None,
            compute_dtype=resolve_compute_dtype(self.compute_dtype, device),
            device=device,
            spread=self.device == "auto" and may_spread(device),
            attn_implementation=self.attn_implementation,
            files=files,
        )

    def _lora_settings(self) -> LoraSettings:
        targets = self.target_modules
        return LoraSettings(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            target_modules=targets if isinstance(targets, str) else tuple(targets),
            use_rslora=bool(self.use_rslora),
            use_dora=bool(self.use_dora),
            init_lora_weights=self.init_lora_weights,
        )

    def _training_settings(self, model_type: str, hidden_size: int) -> "TrainingSettings":
        from skqlora.training import TrainingSettings, scaled_learning_rate

        rate, head_rate = self.learning_rate, self.head_learning_rate
        if rate == "auto":
            rate = scaled_learning_rate(model_type, hidden_size)
        if head_rate == "auto":
            head_rate = HEAD_RATE_FACTOR * rate
        return TrainingSettings(
            num_train_epochs=self.num_train_epochs,
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            gradient_checkpointing=self.gradient_checkpointing,
            learning_rate=rate,
            head_learning_rate=head_rate,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            lr_scheduler_type=self.lr_scheduler_type,
            max_grad_norm=self.max_grad_norm,
            optim=self.optim,
        )

    def _choose_max_length(self, max_positions: int | None, tokenizer_max_length: int) -> int:
        limit = min(max_positions or tokenizer_max_length, tokenizer_max_length)
        if self.max_length == "auto":
            return min(AUTO_MAX_LENGTH, limit)
        if self.max_length > limit:
            raise ValueError(
                f"Got max_length={self.max_length} but {self.model!r} takes {limit} tokens. Pass "
                "at most that, or 'auto'."
            )
        return self.max_length

    def __sklearn_tags__(self):
        """Tell scikit-learn that `X` is one-dimensional text."""
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags
