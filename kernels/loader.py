"""A folder or hub id becomes a model in memory. Every failure is a `LoadError` with one sentence for people.

A local folder never touches the network, and weights are safetensors unless the user trusts the model's code.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ropeway.kernels.errors import LoadError, NotAModel, UnknownArchitecture, UnsupportedModel, UnsupportedSetting
from ropeway.kernels.memory import check_weights_fit

Progress = Callable[[str, float], None]
"""progress(stage for people, share done 0..1)."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

DEFAULT_MAX_MODEL_LEN = 2048
"""For a model whose config names no limit (ALiBi has none)."""

_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")


@dataclass(slots=True, frozen=True)
class LoadedModel:
    """A model in memory, in eval mode on its device."""

    model: PreTrainedModel
    architecture: str
    vocab_size: int
    """Width of the logits."""
    max_model_len: int
    num_parameters: int
    weight_bytes: int
    dtype: torch.dtype
    device: torch.device


def load_model(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    max_model_len: int | None = None,
    progress: Progress = lambda stage, share: None,
) -> LoadedModel:
    """Load a decoder-only language model.

    Args:
        model: folder or hub id.
        revision: of a hub id.
        dtype: auto (fp32 on a CPU, the checkpoint's own on a GPU) or one of `DTYPES`.
        device: auto (the first GPU if there is one), cpu, cuda, cuda:1.
        trust_remote_code: run code that comes with the model, and read weights that are no safetensors.
        max_model_len: longest prompt + output in tokens; None = what the config says.
        progress: is told what happens.

    Raises:
        LoadError: one of its subclasses.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place = _device(device)
    folder = _folder(model)
    progress("reading the config", 0.0)
    config = _config(model, folder, revision, trust_remote_code)
    target = _dtype(dtype, config, place)
    length = _max_model_len(config, max_model_len)
    if folder is not None:
        check_weights_fit(_weight_bytes(folder, config, target, trust_remote_code), place)
    progress("reading weights", 0.1)
    loaded = _weights(model, folder, config, target, place, revision, trust_remote_code)
    progress("weights read", 1.0)
    return LoadedModel(
        model=loaded,
        architecture=type(loaded).__name__,
        vocab_size=_logits_width(loaded),
        max_model_len=length,
        num_parameters=sum(parameter.numel() for parameter in loaded.parameters()),
        weight_bytes=sum(parameter.nbytes for parameter in loaded.parameters()),
        dtype=target,
        device=place,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnsupportedSetting(f"There is no device {name!r}: say cpu, cuda or cuda:1.") from None
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedSetting(f"Device {name!r} is not supported: say cpu, cuda or cuda:1.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedSetting(f"There is no device {name!r}: torch sees {torch.cuda.device_count()} GPUs.")
    return device


def _folder(model: str) -> Path | None:
    """The model's folder; None for a hub id, `name` or `organisation/name`."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise NotAModel(f"{model} is not a model folder: it has no config.json.")
        return path
    if path.is_file():
        raise NotAModel(f"{model} is a file: give the folder that holds config.json and the weights.")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise NotAModel(f"There is no folder {model}.")
    return None


def _config(model: str, folder: Path | None, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(
            folder or model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=folder is not None,
        )
    except OSError:
        if folder is not None:
            raise NotAModel(f"{folder / 'config.json'} is not a model's config.") from None
        raise NotAModel(f"{model} is neither a folder here nor a model that the hub gives us.") from None
    except (ValueError, KeyError):
        raise UnknownArchitecture(
            f"transformers {transformers.__version__} does not know the architecture of {model}: a newer version may, "
            "and --trust-remote-code runs code that comes with the model, if you trust it."
        ) from None
    except Exception as error:  # values of the wrong kind or size: each library has its own exceptions for them
        raise NotAModel(f"The config of {model} is not valid: {_one_line(error)}") from error
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{model} is an encoder-decoder model ({config.model_type}), which is not served yet.")
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModel(f"{model} ({config.model_type}) is not a model that generates text.")
    return config


def _dtype(name: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else _checkpoint_dtype(config)
    if name not in DTYPES:
        raise UnsupportedSetting(f"There is no dtype {name!r}: say auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _checkpoint_dtype(config: PreTrainedConfig) -> torch.dtype:
    dtype = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _max_model_len(config: PreTrainedConfig, wanted: int | None) -> int:
    """The wanted length, or the config's. Linear, dynamic and YaRN scaling allow `factor` times the original one."""
    text = config.get_text_config(decoder=True)
    own = next((value for name in _LENGTH_NAMES if (value := getattr(text, name, None))), None)
    if own is None:
        return wanted or DEFAULT_MAX_MODEL_LEN
    rope = getattr(text, "rope_parameters", None) or {}
    longest = own
    if rope.get("rope_type") in ("linear", "dynamic", "yarn") and rope.get("factor"):
        longest = max(own, int((rope.get("original_max_position_embeddings") or own) * rope["factor"]))
    if wanted is not None and wanted > longest:
        raise UnsupportedSetting(
            f"--max-model-len {wanted} is more than the {longest} tokens that this model's config allows."
        )
    return wanted or own


def _weight_bytes(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> int:
    """Bytes of a folder's weights once they are in memory."""
    files = list(folder.glob("*.safetensors"))
    others = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if not files and not (trust_remote_code and others):
        hint = ": its weights are pickle files, which may run code; --trust-remote-code accepts that" if others else ""
        raise NotAModel(f"{folder} has no safetensors weights{hint}.")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(parts - {file.name for file in files})
        if missing:
            raise NotAModel(f"{folder} lacks {len(missing)} of {len(parts)} weight files, {missing[0]} first.")
    stored = sum(file.stat().st_size for file in files or others)
    if getattr(config, "quantization_config", None):
        return stored
    return stored * dtype.itemsize // _checkpoint_dtype(config).itemsize


def _weights(
    model: str,
    folder: Path | None,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            folder or model,
            config=config,
            revision=revision,
            dtype=dtype,
            device_map={"": device} if device.type != "cpu" else None,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if trust_remote_code else True,
            local_files_only=folder is not None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise NotAModel(f"The weights of {model} cannot be read: {_one_line(error)}") from error
    except (ImportError, ValueError, RuntimeError) as error:
        raise LoadError(f"{model} cannot be loaded: {_one_line(error)}") from error
    # transformers would fill these with random numbers and go on
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise NotAModel(
            f"The weights of {model} do not fit its config: {name} is {list(stored)} and should be {list(wanted)}."
        )
    if report["missing_keys"]:
        name = min(report["missing_keys"])
        raise NotAModel(f"The weights of {model} lack {len(report['missing_keys'])} tensors, {name} first.")
    result: PreTrainedModel = loaded.eval()
    return result


def _logits_width(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    width = getattr(head, "out_features", None) or model.config.get_text_config(decoder=True).vocab_size
    return int(width)


def _one_line(error: Exception) -> str:
    """The end of a library's message: where it has several lines, the last says what is wrong."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
