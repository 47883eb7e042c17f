"""`--deterministic`: a row's logits have the same bits whatever shares its steps, and however it is cut into them.

What makes them so is elsewhere: the products of `triton_matmul.py`, the one class of rows of `triton_attention.py`, and
the kernels of fused modules, which look at one token each. This module puts the products in their places and refuses
what is not known to hold: the operations that the model's own code is left with are watched, one by one, and a small
ragged batch must give the bits that its rows give alone.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ropeway.kernels.errors import UnsupportedSetting
from ropeway.kernels.fusion_modules import untouched
from ropeway.kernels.linear import use_fast_linears
from ropeway.kernels.loader import LoadedModel
from ropeway.kernels.probe import Choice, packed_logits, whole_logits
from ropeway.kernels.triton_matmul import steady_linear

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_BY_TOKEN = frozenset(
    {
        *("_to_copy", "copy_", "clone", "cat", "embedding", "index", "index_copy_", "_unsafe_view", "lift_fresh"),
        *("empty", "empty_like", "empty_strided", "new_empty", "arange", "zeros", "zeros_like", "new_zeros", "zero_"),
        *("ones", "ones_like", "new_ones", "full", "full_like", "new_full", "fill_"),
        *("native_layer_norm", "_fused_rms_norm"),
    }
)
"""Operations beside pointwise ones and views whose result for a token is that of this token alone. The norms: torch's
kernels give a row to one block of threads, as many as the row's length asks for."""
_PRODUCTS = frozenset({"mm", "bmm"})


def check_deterministic(device: str, quantization: str | None, device_map: str, layout: str) -> None:
    """Raises UnsupportedSetting where the flags alone, or the lack of a GPU, rule it out."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        raise UnsupportedSetting(
            "--deterministic needs a GPU: on a CPU a product's last bits depend on how many rows it has, and float32 "
            "is all there is to say (logits then agree to about 1e-5, so tokens are the same)."
        )
    if quantization is not None:
        raise UnsupportedSetting(
            f"--deterministic multiplies weights as they are, not in {quantization}: leave one out."
        )
    if device_map != "none":
        raise UnsupportedSetting("--deterministic keeps all layers on the GPU: leave --device-map out.")
    if layout == "padded":
        raise UnsupportedSetting("--deterministic needs the packed layout: leave --batch-layout out.")


@torch.no_grad()
def make_deterministic(loaded: LoadedModel, choice: Choice) -> None:
    """Make a model deterministic that is fused where it can be, and runs in the chosen layout.

    Raises:
        UnsupportedSetting: it does something that is not known to treat every token alone.
    """
    model, name = loaded.model, loaded.architecture
    if choice.layout != "packed":
        raise UnsupportedSetting(
            f"--deterministic needs the packed layout, and {name} does not run in it: {choice.reason}."
        )
    if loaded.quantization is not None:
        raise UnsupportedSetting(
            f"--deterministic does not multiply weights in {loaded.quantization}, as {name} has them."
        )
    if loaded.dtype not in DTYPES:
        raise UnsupportedSetting("--deterministic multiplies in bfloat16, float16 or float32: say so with --dtype.")
    use_fast_linears(model, steady_linear)
    _swap_conv1d(model)
    unknown, together = watched_operations(model, loaded.max_model_len)
    if unknown:
        raise UnsupportedSetting(
            f"--deterministic does not run {name}: its code uses {', '.join(unknown[:3])}, and torch's kernels for "
            "that may add numbers up in another order when other tokens are there."
        )
    alone = whole_logits(model, loaded.max_model_len, deterministic=True)
    if not all(map(torch.equal, together, alone)):
        raise UnsupportedSetting(
            f"--deterministic does not run {name}: on this GPU the bits of a row's logits depend on its neighbours."
        )


def watched_operations(model: PreTrainedModel, max_model_len: int) -> tuple[list[str], list[torch.Tensor]]:
    """(names of operations that are not known to treat every token alone, the logits) of `packed_logits`."""
    with _Watch() as watch:
        logits = packed_logits(model, max_model_len, deterministic=True)
    return sorted(watch.unknown), logits


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own hook
    """Sees every operation, composed ones in their parts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unknown: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = function.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = function.overloadpacket.__name__
        of_one_number = name in _PRODUCTS and args[0].shape[-1] == 1  # one product, nothing to add
        known = function.is_view or torch.Tag.pointwise in function.tags or name in _BY_TOKEN or of_one_number
        if not known:
            self.unknown.add(name)
        return function(*args, **kwargs)


def _swap_conv1d(model: nn.Module) -> None:
    """GPT-2's linear layers, whose weights lie the other way round: turned in memory, they are like the others."""
    for module in model.modules():
        if type(module) is Conv1D and untouched(module):
            weight, _ = module.parameters()
            module.weight = nn.Parameter(weight.T.contiguous().T, requires_grad=False)
            vars(module)["forward"] = partial(_conv1d, module)


def _conv1d(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight, bias = module.parameters()
    return steady_linear(x, weight.T, bias)
