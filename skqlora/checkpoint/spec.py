"""The specification of the base that a fit or a prediction needs."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from skqlora._utils.libraries import muted
from skqlora.adapter import AdapterState
from skqlora.checkpoint.architecture import Architecture, check_architecture
from skqlora.checkpoint.configuration import pin_revision
from skqlora.checkpoint.device import may_spread, resolve_compute_dtype, resolve_device
from skqlora.checkpoint.stored_quantization import check_stored_quantization
from skqlora.settings.parameters import Parameters


@dataclass(frozen=True)
class BackboneSpec:
    """Everything that makes one loaded base differ from another.

    Attributes
    ----------
    model : str
        A Hub id or a local folder.
    revision : str or None
    quantization : {"nf4", "fp4"} or None
    double_quant : bool
        Whether to quantize the quantization constants too.
    compute_dtype : torch.dtype
        The dtype of the products with the base's weights.
    device : torch.device
    spread : bool
        Whether to put what does not fit on `device` onto the next ones.
    attn_implementation : str or None
        The name of the attention kernel in transformers, which chooses one if it is None.
    files : tuple
        The result of `describe_files`, so that a changed folder is another base.
    """

    model: str
    revision: str | None
    quantization: str | None
    double_quant: bool
    compute_dtype: torch.dtype
    device: torch.device
    spread: bool = False
    attn_implementation: str | None = None
    files: tuple = ()

    @classmethod
    def of(
        cls, parameters: Parameters, adapter: AdapterState | None = None, *, here: bool = True
    ) -> "BackboneSpec":
        """Determine which base the parameters mean.

        Parameters
        ----------
        parameters : Parameters
        adapter : AdapterState, optional
            A fitted adapter. If it was trained on this model, the base is the same commit.
        here : bool, default=True
            Whether the device has to be on this machine.

        Returns
        -------
        spec : BackboneSpec

        Raises
        ------
        ValueError
            If there is no such device, or it cannot compute in that precision.
        """
        if not parameters.model:
            raise ValueError(
                "Got model=''. Wanted: a folder, or a model id of the Hugging Face Hub."
            )
        device = resolve_device(parameters.device, here=here)
        found = parameters.model if adapter is None else adapter.find_base(parameters.model)
        files = describe_files(found)
        model = str(files[0]) if files else found  # the same however the path is written
        if adapter is not None and adapter.revision is not None and adapter.model == model:
            revision = adapter.revision
        else:
            revision = parameters.revision if files else pin_revision(model, parameters.revision)
        return cls(
            model=model,
            revision=revision,
            quantization=parameters.quantization,
            double_quant=parameters.double_quant and parameters.quantization is not None,
            compute_dtype=resolve_compute_dtype(parameters.compute_dtype, device),
            device=device,
            spread=parameters.device == "auto" and may_spread(device),
            attn_implementation=parameters.attn_implementation,
            files=files,
        )

    def architecture(self, *, progress_bars: bool = False) -> Architecture:
        """Read the model's configuration; raise ValueError for a model that cannot be adapted."""
        with muted(progress_bars=progress_bars):
            architecture = check_architecture(
                self.model,
                self.revision,
                quantized=self.quantization is not None,
                attn_implementation=self.attn_implementation,
                files=self.files,
            )
            check_stored_quantization(
                architecture.stored_quantization,
                model=self.model,
                quantization=self.quantization,
                double_quant=self.double_quant,
            )
            return architecture

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of what is not quantized: embeddings and norms, or everything."""
        if self.quantization is None or self.compute_dtype == torch.bfloat16:
            return self.compute_dtype
        return torch.float32  # float16 would overflow in the residual stream


def describe_files(model: str) -> tuple:
    """List the path and files of a local folder, with sizes and times; return () for a Hub id."""
    folder = Path(model)
    if not folder.is_dir():
        return ()
    files = []
    for path in sorted(folder.iterdir()):
        with suppress(FileNotFoundError):  # another program's temporary file may vanish
            if path.is_file():
                files.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    return folder.resolve(), *files
