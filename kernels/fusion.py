"""Fewer launches and bytes per layer, for any family: transformers' own model with a few of its modules stood in for.

    merged projections       linear layers of one parent that get one tensor become one product: q, k, v; gate, up
    RMSNorm and LayerNorm    one launch, and one together with the residual addition before it
    rotation + KV write      one launch, the norm of each head of q and k included
    gated activation         one launch after the merged gate and up
    cos and sin              one launch per forward

What a module does is found by watching the model run and by asking the module; what the model does between modules
need not be known, since results that nobody has asked for yet are deferred (`fusion_deferred.py`). Every stand-in has
given its module's own outputs before it is used, and the whole model its own logits afterwards, or all is undone.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ropeway.kernels.fused_ops import Activation
from ropeway.kernels.fusion_deferred import Activated, Deferred, Sum, Uses, plain
from ropeway.kernels.fusion_modules import (
    Recording,
    Undo,
    close,
    find_activation,
    find_norm,
    merge,
    norm_forward,
    replace_forward,
    siblings,
    untouched,
)
from ropeway.kernels.fusion_rotary import RotaryCall, rotary_calls, table_forwards
from ropeway.kernels.probe import allowed_difference, largest_difference, packed_logits
from ropeway.kernels.quantization import multiplies_in_int8
from ropeway.kernels.triton_ahead import CompileAhead, one_by_one

FP32_RELATIVE = 1e-4
"""Of the largest logit: what another order of additions may change in fp32."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class FusionReport:
    """What was fused, as numbers of places in the model, and what was not."""

    merged: int = 0
    """Products of several linear layers."""
    norms: int = 0
    residuals: int = 0
    """Of the norms: together with the addition before them."""
    rotations: int = 0
    """Layers that rotate and write K and V in one launch."""
    gates: int = 0
    tables: int = 0
    """Modules that give cos and sin."""
    left: list[str] = field(default_factory=list)
    """What stays as it was, and why."""
    difference: float = 0.0
    """Largest change of a logit, on a small ragged batch."""

    def sentence(self) -> str:
        """For people."""
        counts = {
            "merged projections": self.merged,
            "norms": self.norms,
            "of them with the residual": self.residuals,
            "rotations with the KV write": self.rotations,
            "gated activations": self.gates,
            "tables of angles": self.tables,
        }
        done = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
        return f"fused: {done or 'nothing'}" + (f"; left: {'; '.join(self.left)}" if self.left else "")


@torch.no_grad()
def fuse(model: PreTrainedModel, max_model_len: int, ahead: CompileAhead = one_by_one) -> FusionReport:
    """Fuse what can be in a model that runs packed; its logits stay within rounding, or it stays as it was.

    Args:
        model: in eval mode, rope fixed. Merged weights are made one product at a time and replace the old ones.
        max_model_len: tokens, as for `choose_layout`.
        ahead: compiles the fused model's kernels.
    """
    if model.dtype not in DTYPES:
        report = FusionReport(left=[f"everything, as there are no kernels for {model.dtype}"])
    else:
        fusing = _Fusing(model, max_model_len, ahead)
        try:
            report = fusing.run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # foreign model code, which may mind what stands in its place
            fusing.undo()
            report = FusionReport(left=[f"everything, as the fused model raises {type(error).__name__}: {error}"])
    logger.info(report.sentence())
    return report


class _Fusing:
    """The steps of `fuse`."""

    def __init__(self, model: PreTrainedModel, max_model_len: int, ahead: CompileAhead) -> None:
        self._model = model
        self._max_model_len = max_model_len
        self._ahead = ahead
        self._report = FusionReport()
        self._undos: dict[str, list[Undo]] = {}
        self._uses = {kind: Uses() for kind in ("rotation", "gate", "sum", "head norm")}

    def run(self) -> FusionReport:
        """Watch, put stand-ins, compare, keep what was of use."""
        allowed = allowed_difference(self._model, self._max_model_len)
        calls = self._put("rotation", *rotary_calls(self._model, self._uses["rotation"]))
        recording = Recording()
        self._put("watch", None, recording.watch(self._model))
        before = packed_logits(self._model, self._max_model_len)
        self.undo(["watch"])
        if self._model.dtype == torch.float32 and not multiplies_in_int8(self._model):
            allowed = FP32_RELATIVE * max(1.0, *(float(logits.abs().max()) for logits in before))
        self._merge(recording)
        self._rotations(calls)
        self._leaves(recording)
        self._tables(recording)
        self._sums()
        self._ahead(lambda: packed_logits(self._model, self._max_model_len))
        forwards: list[None] = []
        self._put("watch", None, self._model.register_forward_pre_hook(lambda *_: forwards.append(None)).remove)
        after = packed_logits(self._model, self._max_model_len)
        self.undo(["watch"])
        self._report.difference = largest_difference(after, before)
        if not self._report.difference <= allowed:  # NaN is not
            self.undo()
            reason = f"the fused logits differ by {self._report.difference:.1e} (allowed {allowed:.1e})"
            return FusionReport(left=[f"everything, as {reason}"], difference=self._report.difference)
        self._report.residuals = self._uses["sum"].fused // len(forwards)
        self._drop_unused()
        return self._report

    def undo(self, kinds: Iterable[str] | None = None) -> None:
        """Put modules back in their places: those of some kinds, or all."""
        for kind in list(self._undos) if kinds is None else kinds:
            for undo in reversed(self._undos.pop(kind, [])):
                undo()

    def _put(self, kind: str, result: T, undo: Undo) -> T:
        self._undos.setdefault(kind, []).append(undo)
        return result

    def _merge(self, recording: Recording) -> None:
        for linears in siblings(self._model, recording):
            seen = [recording.calls[linear] for linear in linears]
            pieces, undo = merge(self._model, linears)
            if all(close(piece(x), y) for piece, (x, y) in zip(pieces, seen, strict=True)):
                self._put("merged", pieces, undo)
                self._report.merged += 1
            else:
                undo()
                self._report.left.append("linear layers whose merged product differs")

    def _rotations(self, calls: list[RotaryCall]) -> None:
        self._report.rotations = sum(call.learn() for call in calls)
        unknown = len(calls) - self._report.rotations
        if unknown:
            self._report.left.append(f"the rotation of {unknown} layers, which have none or one of another kind")

    def _leaves(self, recording: Recording) -> None:
        """Norms and activations."""
        others: Counter[str] = Counter()
        for module, (x, y) in recording.calls.items():
            if not untouched(module):
                continue
            norm = find_norm(module, x, y)
            if norm is not None:
                self._put("norm", None, replace_forward(module, norm_forward(norm, self._uses["head norm"])))
                self._report.norms += 1
                continue
            if x.shape == y.shape and {parameter.dim() for parameter in module.parameters()} == {1}:
                others[type(module).__name__] += 1
            activation = find_activation(module, x, y)
            if activation is not None:
                self._put("gate", None, replace_forward(module, _activation_forward(activation, self._uses["gate"])))
                self._report.gates += 1
        self._report.left += [f"{number} {name} of a kind without a kernel" for name, number in others.items()]

    def _tables(self, recording: Recording) -> None:
        for module, forward in table_forwards(recording, self._max_model_len).items():
            self._put("table", None, replace_forward(module, forward))
            self._report.tables += 1

    def _sums(self) -> None:
        """What goes from layer to layer defers its additions."""
        depth = self._model.config.get_text_config(decoder=True).num_hidden_layers
        for layers in self._model.modules():
            if isinstance(layers, nn.ModuleList) and len(layers) == depth:
                for layer in layers:
                    if untouched(layer):
                        self._put("sum", None, replace_forward(layer, _summing(layer.forward, self._uses["sum"])))

    def _drop_unused(self) -> None:
        """A value that is deferred and then always computed plainly only costs host time."""
        if not self._uses["rotation"].fused:
            self._report.rotations = 0
            self.undo(["rotation"])
        if not self._uses["gate"].fused:
            self._report.gates = 0
            self.undo(["gate"])
        if not self._uses["sum"].fused:
            self.undo(["sum"])


def _activation_forward(activation: Activation, uses: Uses) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gate: Activated(plain(gate), activation, uses)


def _summing(forward: Callable[..., Any], uses: Uses) -> Callable[..., Any]:
    """A layer's forward whose hidden states, the first argument, begin a chain of sums."""

    def summing(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], torch.Tensor) and not isinstance(args[0], Deferred):
            args = Sum(args[0], None, uses), *args[1:]
        return forward(*args, **kwargs)

    return summing
