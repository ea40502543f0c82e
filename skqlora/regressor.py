"""`QLoRARegressor`: the scikit-learn contract of a regressor, without torch's internals."""

from typing import Any, ClassVar

import numpy as np
from sklearn.base import RegressorMixin

from skqlora.base_estimator import BaseQLoRA
from skqlora.settings.constraints import REGRESSOR_CONSTRAINTS
from skqlora.settings.names import with_checked_names
from skqlora.text.inputs import check_numbered_texts
from skqlora.text.targets import Numbers
from skqlora.training.callbacks import with_callbacks
from skqlora.training.epochs import check_incremental, fit_piece


class QLoRARegressor(RegressorMixin, BaseQLoRA):
    r"""Text regressor that fine-tunes a 4-bit language model with QLoRA.

    It is `QLoRAClassifier` with a head that predicts numbers: `fit` loads the model in 4-bit NF4
    with double quantization, adds low-rank adapters (LoRA) to every linear layer, and trains them
    together with a linear head, using paged AdamW [1]_. The numbers are standardized for the
    training, and predictions are in their units.

    Parameters
    ----------
    model : str or path, default="Qwen/Qwen3-0.6B-Base"
        The id of a model on the Hugging Face Hub, or a local folder: a text encoder (BERT, RoBERTa,
        DeBERTa, ModernBERT ...) or a decoder (Llama, Qwen, Mistral, Gemma, Phi, GPT-2 ...).
    revision : str, default=None
        The branch, tag or commit of the model on the Hub.
    quantization : {"nf4", "fp4"} or None, default="nf4"
        The 4-bit data type of the base, the frozen model. None keeps it in `compute_dtype`.
    double_quant : bool, default=True
        Whether the quantization constants are quantized too, which saves 0.37 bits per parameter.
    compute_dtype : {"auto", "bfloat16", "float16", "float32"}, default="auto"
        The precision that the base computes in. "auto" is bfloat16 if the hardware multiplies it,
        otherwise float16 (GPU) or float32 (CPU). Adapter and head are float32.
    device : str, default="auto"
        The torch device, such as "cuda:1". "auto" takes the first available one of CUDA, XPU and
        the CPU, or spreads a large base over several GPUs, which compute one after the other.
    attn_implementation : str, default=None
        The attention kernel, by its name in transformers: "sdpa", "eager", "flash_attention_2" ...
        None leaves the choice to transformers.
    lora_r : int, default=16
        The rank of the adapters.
    lora_alpha : float, default=16
        The scale of the adapters: their output is multiplied by `lora_alpha / lora_r`.
    lora_dropout : float, default=0.05
        The share of the adapters' input features that is dropped in training. One mask is drawn for
        each update and layer. The base's own dropout is off.
    target_modules : "all-linear", str or list of str, default="all-linear"
        The linear layers that get an adapter: all of them, those whose name matches a regular
        expression, or those whose name ends with an entry of a list.
    layers : "all", int or list of int, default="all"
        The layers that get adapters: all, as many at the end as an int says, or those whose numbers
        a list has, from 0 on or negative from the end. A few at the end train faster.
    cache_dtype : "auto", "bfloat16" or None, default="auto"
        With `layers`, the output of the layers before the first adapted one is computed once for
        each text and kept in this precision; "auto" is its own. It takes at most a tenth of the
        free memory, or else a temporary file. None keeps nothing; nor do fits of one epoch.
    use_rslora : bool, default=False
        Whether LoRA's output is multiplied by `lora_alpha / sqrt(lora_r)` (arXiv 2312.03732).
    use_dora : bool, default=False
        Whether the magnitudes of the weights are learned separately from their directions (DoRA,
        arXiv 2402.09353). This is slower.
    init_lora_weights : True or "gaussian", default=True
        The initial values of LoRA's matrix A: Kaiming uniform, or Gaussian. B starts at zero.
    init_head_weights : {"normal", "probe"}, default="normal"
        The initial values of the head. "normal" draws small random numbers. "probe" fits a ridge
        regression to the vectors that the untrained model computes from the training texts (arXiv
        2202.10054), which costs one prediction of these texts; `partial_fit` draws random numbers
        instead.
    pooling : {"auto", "last", "mean", "cls", "pooler"}, default="auto"
        The way in which the hidden states of a text become one vector. "auto" takes the last token
        of a decoder and the mean over the tokens of an encoder.
    max_length : int or "auto", default="auto"
        The greatest number of tokens of a text, including special tokens and those of `prompt`.
        "auto" is 512, or the model's limit if that is less.
    truncation : {"head", "tail", "head+tail", "windows"}, default="head"
        The part that is kept of a text that is too long: its head, its tail, or both, with a
        quarter of the room for the head (arXiv 1905.05583). "windows" keeps all of it: training
        uses each window with the text's number and an equal part of its weight, and a prediction is
        the mean over them. Of several columns the longest is cut first, and windows are made
        of a pair's second text or of the prompt's longest field.
    stride : int, default=0
        The number of tokens that a window shares with the one before: at most half of a window.
    prompt : str, default=None
        A template with a field for each text, such as ``"{text}\nStars:"``. It is never cut. For
        several columns its fields are their names or positions, as in `str.format`:
        ``"{title}, {price:.2f} EUR"``. Without a prompt, an encoder reads two columns as its
        tokenizer's pair of texts; other tables are read as lines ``name: value``.
    num_train_epochs : int or "auto", default="auto"
        The number of passes over the texts. "auto" is as many as make 300 updates, from 3 to 20.
    batch_size : int, default=16
        The number of texts of one update, if `gradient_accumulation_steps` is 1. A forward pass has
        at most that many of the longest texts, and on a CPU at most 2,048 tokens of them.
    gradient_accumulation_steps : int, default=1
        How many times `batch_size` texts an update uses. Only memory and time depend on the split.
    gradient_checkpointing : "auto" or bool, default="auto"
        Whether activations are computed again instead of being kept. This takes less memory and
        about a third more time. "auto" does it if the fit would not fit into memory otherwise,
        which `skqlora.estimate_memory` computes.
    learning_rate : float or "auto", default="auto"
        The peak learning rate of LoRA. "auto" depends on the width of the model, as in
        `QLoRAClassifier`.
    head_learning_rate : float or "auto", default="auto"
        The peak learning rate of the head. "auto" is ten times LoRA's.
    weight_decay : float, default=0.0
        The share of each weight, times the learning rate, that an update subtracts.
    warmup_steps : int or float, default=0.1
        The number of updates, or below 1 their share, over which the learning rates rise from 0.
    lr_scheduler_type : str, default="linear"
        The course of the learning rates after the warm-up, as in `transformers.get_scheduler`:
        "linear", "cosine", "constant", "constant_with_warmup" or "inverse_sqrt".
    max_grad_norm : float or None, default=1.0
        The L2 norm to which larger gradients are scaled down. None leaves them as they are.
    optim : {"paged_adamw_32bit", "paged_adamw_8bit", "adamw"}, default="paged_adamw_32bit"
        The paged AdamW of bitsandbytes, whose state moves to the host if a GPU is full, or torch's.
    loss : {"squared_error", "absolute_error", "huber"}, default="squared_error"
        The loss, in units of the standard deviation of `y`: the squared or the absolute difference,
        or Huber's, which is linear for differences above one standard deviation.
    early_stopping : bool, default=False
        Whether held-out texts are scored after each epoch. The fit stops when the score no longer
        rises, and keeps the adapter of the best epoch, or the last of equally good ones. With
        `warm_start` the adapter at the start counts as an epoch.
    validation_fraction : float, default=0.1
        The share of the texts that early stopping holds out, at random, unless `fit` gets `X_val`.
    n_iter_no_change : int, default=2
        The number of epochs in a row without a rise of the score after which the fit stops.
    tol : float, default=1e-4
        The least difference that counts as a rise of the score.
    scoring : str, callable or None, default=None
        The score of early stopping: a scorer's name or a callable as in scikit-learn, "loss" for
        the negative loss, or None for `score`.
    warm_start : bool, default=False
        Whether `fit` continues from the fitted adapter and its curves, with a new optimizer and
        schedule. `target_mean_` and `target_scale_` stay. Of the same texts the same part is held
        out.
    checkpoint_dir : str or path, default=None
        A folder in which `fit` notes its progress until it is done. If the process is killed, the
        same call with an int as `random_state` resumes from there and comes to the same result: on
        a CPU bit for bit, with the same number of threads.
    checkpoint_every : int, default=500
        The number of updates between two checkpoints, each three to four times the adapter's size.
    random_state : int, RandomState instance or None, default=None
        The seed of the initial values of adapter and head, of the held-out texts, of the order of
        the texts and of dropout. On a CPU the same seed and number of threads give the same weights
        bit for bit. No global random state is used or changed, except that None draws from NumPy's.
    verbose : int, default=0
        1 shows the progress of fits and long predictions, and of downloading and loading a model.

    Attributes
    ----------
    target_mean_ : ndarray of shape (n_outputs,)
        The mean of `y`, weighted like the texts.
    target_scale_ : ndarray of shape (n_outputs,)
        The standard deviation of `y`, weighted like the texts.
    n_features_in_ : int
        The number of columns, if `X` was a table.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        The names of the columns, if `X` was a table with names that are all str.
    adapter_ : AdapterState
        The adapter and the head, as NumPy arrays of some megabytes. The base is not in it.
    settings_ : Settings or None
        The parameters of the fit, with its choices instead of "auto" (except for `cache_dtype`).
        None if `from_peft` made the regressor, or if it was read from a folder without settings.
    n_iter_ : int
        The number of epochs trained, or of calls of `partial_fit`.
    n_samples_seen_ : int
        The number of texts that `fit` trained on, plus those of later calls of `partial_fit`.
    loss_curve_ : list of float, of length n_epochs
        The mean training loss of each epoch, with the training's weights.
    validation_scores_ : list of float, of length n_epochs, or None without early stopping
        The score of each epoch on the held-out texts; NaN for epochs without early stopping.
    best_validation_score_ : float, or None without early stopping
        The score of the adapter that was kept.
    optimizer_state_ : OptimizerState or None
        The optimizer for the next `partial_fit`, up to twice the adapter's size. None after `fit`.
    footprint_ : Footprint
        The size of the base in memory, and of what was trained.

    See Also
    --------
    QLoRAClassifier : Predict classes, or several labels of a text.
    LossCurveDisplay : Plot the loss and the validation score of each epoch.
    estimate_memory : Estimate the memory that a fit takes, before a model is loaded.
    sklearn.model_selection.GridSearchCV : Search over parameters such as `lora_r`.
    sklearn.compose.TransformedTargetRegressor : Train on another scale, such as the logarithm.

    References
    ----------
    .. [1] Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.

    Examples
    --------
    >>> from skqlora import QLoRARegressor
    >>> texts = ["Never again", "It was fine", "We loved every minute"] * 10
    >>> stars = [1, 3, 5] * 10
    >>> reg = QLoRARegressor("Qwen/Qwen3-0.6B-Base", random_state=0).fit(texts, stars)
    >>> reg.predict(["We loved it"]).round()
    array([5.])
    """

    _target = Numbers
    _parameter_constraints: ClassVar[dict[str, list]] = REGRESSOR_CONSTRAINTS

    @with_checked_names
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
        loss="squared_error",
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
        self.loss = loss
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
        """Fine-tune the model on texts and their numbers.

        Parameters
        ----------
        X : array-like of str, of shape (n_texts,), or table of shape (n_texts, n_columns)
            The texts in a list, Series or array; or a table whose columns are read together: a
            DataFrame (pandas, polars, pyarrow, `datasets`), an array or a list of tuples.
        y : array-like of shape (n_texts,) or (n_texts, n_outputs)
            The numbers.
        sample_weight : array-like of shape (n_texts,), default=None
            The weight of each text in the loss. A text of weight 0 is left out.
        X_val, y_val : like `X` and `y`, default=None
            The texts and numbers that early stopping scores, instead of a part of `X`. Within a
            `Pipeline`, ``transform_input=["X_val"]`` sends the texts through the steps before. If
            they are as many as in `X`, scikit-learn's searches cut them into folds, too.
        sample_weight_val : array-like of shape (n_validation_texts,), default=None
            The weights of the validation texts in that score.

        Returns
        -------
        self : QLoRARegressor
            The fitted estimator.

        Raises
        ------
        ValueError, TypeError
            If the input or the parameters cannot work: where possible, before a model is loaded.
        MemoryError
            If not even the smallest passes would fit into memory. No model is loaded then.
        FloatingPointError
            If the training diverges. The regressor keeps the last epoch before that, if any.
        RuntimeError
            If the process was forked from one that has computed on threads, or if two threads of a
            process of `torch.distributed` fit at once.
        """
        self._validate_params()
        start = self._get_fitted() if self.warm_start and hasattr(self, "adapter_") else None
        inputs = self._check_texts(X, start)
        earlier = None if start is None else start.target
        table = check_numbered_texts(inputs, y, sample_weight, loss=self.loss, earlier=earlier)
        held_out = self._check_validation(table, X_val, y_val, sample_weight_val)
        return self._fit_table(table, held_out, start)

    def partial_fit(self, X, y, sample_weight=None):
        """Train one epoch on one piece of the data, continuing from what was fitted before.

        The optimizer continues too. The learning rates do not decay, because the amount of data to
        come is unknown. A `warmup_steps` below 1 means no warm-up. Callbacks are not called. The
        first piece decides in which units the numbers are trained on.

        Parameters
        ----------
        X : array-like of str, of shape (n_texts,), or table of shape (n_texts, n_columns)
            The texts.
        y : array-like of shape (n_texts,) or (n_texts, n_outputs)
            The numbers.
        sample_weight : array-like of shape (n_texts,), default=None
            The weight of each text in the loss, relative to the mean weight of the first call.

        Returns
        -------
        self : QLoRARegressor
            The fitted estimator.

        Raises
        ------
        ValueError, TypeError
            If `fit` would raise it, or if `early_stopping` is set, which needs all data at once.
        """
        self._validate_params()
        check_incremental(self)
        start = self._get_fitted() if hasattr(self, "adapter_") else None
        inputs = self._check_texts(X, start)
        earlier = None if start is None else start.target
        table = check_numbered_texts(inputs, y, sample_weight, loss=self.loss, earlier=earlier)
        self._set_fitted(fit_piece(self, table, start))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predict the number of each text.

        Parameters
        ----------
        X : array-like of str, of shape (n_texts,), or table of shape (n_texts, n_columns)
            The texts, or an iterator or stream of them, which is read in chunks.

        Returns
        -------
        numbers : ndarray of shape (n_texts,) or (n_texts, n_outputs), float64
            The numbers, in the units and the shape of the fitted ones.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If the regressor is not fitted.
        TypeError, ValueError
            If `X` does not hold texts, or if `model` is not the base of the fit or is gone.
        RuntimeError
            If the process was forked from one that has computed on threads.
        """
        fitted, outputs = self._compute_outputs(X)
        assert isinstance(fitted.target, Numbers)
        return fitted.target.from_outputs(outputs)

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that `y` may have several columns."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
