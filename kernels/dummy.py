"""Random weights in a model's shape, made on its device: for benchmarks and tests that need no checkpoint."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ropeway.kernels.memory import check_weights_fit

SEED = 0
"""The same shape on the same kind of device always gets the same weights."""


def dummy_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model that nobody trained, initialised as its family is before training: matrices are normal with the
    config's `initializer_range` (0.02), norms 1, biases 0. In eval mode; torch's generators stay as they were.

    Raises:
        NotEnoughMemory: the device has less free than the weights need.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    check_weights_fit(sum(parameter.nbytes for parameter in model.parameters()), device)
    model.to_empty(device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(SEED)
        # Not the parameters alone: buffers that no checkpoint holds (rotary frequencies) were on meta too.
        model.init_weights()
    return model.eval()
