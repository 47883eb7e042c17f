"""Every flag once: name, type, default, environment variable, group, help and range. Knows no engine and no HTTP.

Precedence: flag > environment variable `ROPEWAY_<FLAG>` > `--config` file > default. A value is text until `Settings`
is made, wherever it came from, so that all three sources are checked alike; errors name the source that was wrong.
"""

import ctypes
import difflib
import ipaddress
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ropeway.kernels.runner_options import RunnerOptions
from ropeway.scheduler.config import EngineConfig
from ropeway.server.errors import UsageError
from ropeway.server.setting_values import convert_text, parse_bytes, parse_device, parse_template, parse_workers
from ropeway.server.tool_formats import ReasoningFormatName, ToolFormatName

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEMO_NAME = "ropeway-demo"
AUTO_API_WORKERS, CORES_PER_API_WORKER = 8, 4


@dataclass(slots=True, frozen=True)
class Flag:
    """What the command line shows of a setting, and its range (both ends included)."""

    group: str
    help: str
    low: float | None = None
    high: float | None = None
    parse: Callable[[str], Any] | None = None
    """Text -> value where the type alone does not say how. Raises: ValueError with the reason."""


def flag(default: Any, group: str, help: str, *, secret: bool = False, **more: Any) -> Any:
    """A dataclass field that is a command line flag; a secret one is not in the settings' repr."""
    return field(default=default, repr=not secret, metadata={"flag": Flag(group, help, **more)})


SERVER, MODEL, BATCH, LIMITS, SECURITY = "Server", "Model", "Batch and memory", "Limits", "Access"


@dataclass(slots=True, frozen=True, kw_only=True)
class Settings:
    """Everything the user chose. Picklable: API workers get it as it is."""

    model: str = flag("", MODEL, "folder or hub id; without it the small embedded demo model is served")
    served_model_name: tuple[str, ...] = flag((), MODEL, "names clients may use for the model; the first is shown")
    tokenizer: str | None = flag(None, MODEL, "folder or hub id of the tokenizer, if it is not the model's own")
    chat_template: str | None = flag(None, MODEL, "chat template, a file or its text", parse=parse_template)
    tool_format: ToolFormatName = flag(  # noqa: RUF009 (it does not see that this is a Literal)
        "auto", MODEL, "how the model writes tool calls; auto reads it off the chat template, none leaves them text"
    )
    reasoning_format: ReasoningFormatName = flag(  # noqa: RUF009
        "auto", MODEL, "how the model writes thoughts; auto reads it off the chat template, none leaves them text"
    )
    revision: str | None = flag(None, MODEL, "branch, tag or commit of a hub model")
    trust_remote_code: bool = flag(False, MODEL, "run Python code that comes with the model")
    generation_config: str = flag(
        "auto",
        MODEL,
        "defaults of requests: auto (the model's generation_config.json), none, or another such file in its folder",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "half", "float"] = flag("auto", MODEL, "of the weights")
    device: str = flag("auto", MODEL, "auto, cpu, cuda or cuda:N", parse=parse_device)
    load_format: Literal["auto", "safetensors", "dummy"] = flag(
        "auto", MODEL, "weights to read; dummy makes random ones, for benchmarks"
    )
    quantization: Literal["fp8", "bitsandbytes-nf4", "bitsandbytes-fp4", "bitsandbytes-int8"] | None = flag(
        None, MODEL, "weights in 4 or 8 bits; a model that is stored so needs no flag"
    )
    device_map: Literal["none", "auto"] = flag(
        "none", MODEL, "auto: layers that the GPU has no room for stay in the machine's memory"
    )
    seed: int | None = flag(
        None, MODEL, "of requests that bring none; without it each gets a random one", low=-(2**63), high=2**63 - 1
    )

    max_model_len: int | None = flag(None, BATCH, "longest prompt + output in tokens", low=1)
    max_num_seqs: int = flag(64, BATCH, "rows that share a step", low=1, high=65536)
    max_num_batched_tokens: int = flag(2048, BATCH, "tokens computed in one step", low=1)
    block_size: int = flag(16, BATCH, "tokens per block of the KV cache", low=1, high=1024)
    kv_cache_memory_bytes: int | None = flag(None, BATCH, "size of the KV cache", low=1, parse=parse_bytes)
    kv_cache_dtype: Literal["auto", "fp8"] = flag(
        "auto", BATCH, "of the KV cache; fp8 holds twice as many tokens of a 16-bit model and rounds keys and values"
    )
    gpu_memory_utilization: float = flag(0.9, BATCH, "share of the GPU that may be used", low=0.01, high=1)
    enable_prefix_caching: bool = flag(True, BATCH, "keep the KV of prompts for those that begin alike")
    optimize_for: Literal["latency", "throughput", "smoothness"] = flag(
        "latency",
        BATCH,
        "prompts come in chunks that hold up nobody's tokens for long; as fast as a step holds them; or so slowly that "
        "gaps between tokens stay below three decode steps",
    )
    prefix_cache_scope: Literal["key", "server"] = flag(
        "key", BATCH, "who shares cached prompts: callers with one key, or all"
    )
    batch_layout: Literal["auto", "padded", "packed"] = flag(
        "auto", BATCH, "left-padded tensors, or the same grid with its pads skipped"
    )
    deterministic: bool = flag(
        False, BATCH, "on a GPU: the same bits whatever shares the batch, in bfloat16 too; slower, see deterministic.md"
    )

    queue_requests: int | None = flag(None, LIMITS, "choices in flight; default 4 x max-num-seqs, at least 256", low=1)
    queue_tokens: int | None = flag(
        None, LIMITS, "prompt tokens waiting for their first output; default 4096 x queue-requests", low=1
    )
    request_timeout: float | None = flag(None, LIMITS, "seconds a request may take, queue included", low=0.001)
    drain_timeout: float = flag(30.0, LIMITS, "seconds running streams get after SIGTERM", low=0)
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = flag(
        "raw_logprobs", MODEL, "of output tokens: of the model's own logits, or after penalties, bans and filters"
    )
    max_logprobs: int = flag(20, LIMITS, "most logprobs per token a request may ask for", low=0, high=1000)
    strict: bool = flag(False, LIMITS, "refuse unknown request fields instead of naming them in x-ignored-params")

    api_key: tuple[str, ...] = flag((), SECURITY, "key that clients must send; repeatable", secret=True)
    api_key_file: str | None = flag(None, SECURITY, "file with one key a line, plain or sha256:HEX")
    no_auth: bool = flag(False, SECURITY, "serve other machines without any secret")
    allowed_origins: tuple[str, ...] = flag((), SECURITY, "origins of web pages that may call the server, or *")

    host: str = flag("127.0.0.1", SERVER, "address to listen on")
    port: int = flag(8000, SERVER, "port to listen on; 0 = any free one", low=0, high=65535)
    root_path: str = flag("", SERVER, "path prefix under which a proxy shows the server")
    api_workers: str = flag(
        "auto",
        SERVER,
        f"processes that answer HTTP; auto: one per {CORES_PER_API_WORKER} cores, 1 to {AUTO_API_WORKERS}",
        parse=parse_workers,
    )
    log_level: Literal["debug", "info", "warning", "error"] = flag("info", SERVER, "of what goes to stderr")

    @property
    def served_names(self) -> tuple[str, ...]:
        """Names a request may give, the first one in answers: a folder goes by its last part, a hub id as it is."""
        if self.served_model_name:
            return self.served_model_name
        if not self.model:
            return (DEMO_NAME,)
        return (Path(self.model).resolve().name if Path(self.model).is_dir() else self.model,)

    @property
    def has_keys(self) -> bool:
        """Whether callers need a key."""
        return bool(self.api_key or self.api_key_file)

    @property
    def num_api_workers(self) -> int:
        """Processes that answer HTTP; auto counts the cores that this process may use."""
        if self.api_workers != "auto":
            return int(self.api_workers)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(max(cores // CORES_PER_API_WORKER, 1), AUTO_API_WORKERS)

    @property
    def max_queued_requests(self) -> int:
        """Slots of the queue."""
        return self.queue_requests or max(256, 4 * self.max_num_seqs)

    @property
    def max_queued_tokens(self) -> int:
        """Prompt tokens that may wait."""
        return self.queue_tokens or 4096 * self.max_queued_requests

    def engine_config(self) -> EngineConfig:
        """The part that the engine process needs."""
        runner = RunnerOptions(
            model=self.model or str(DEMO_MODEL),
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            dtype={"half": "float16", "float": "float32"}.get(self.dtype, self.dtype),
            device=self.device,
            load_format=self.load_format,
            quantization=self.quantization,
            device_map=self.device_map,
            max_model_len=self.max_model_len,
            layout=self.batch_layout,
            deterministic=self.deterministic,
            processed_logprobs=self.logprobs_mode == "processed_logprobs",
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            kv_cache_bytes=self.kv_cache_memory_bytes,
            kv_cache_dtype=self.kv_cache_dtype,
            gpu_memory_utilization=self.gpu_memory_utilization,
        )
        return EngineConfig(
            runner,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            generation_config=self.generation_config,
            enable_prefix_caching=self.enable_prefix_caching,
            prefix_cache_scope=self.prefix_cache_scope,
            optimize_for=self.optimize_for,
            served_model_name=self.served_names[0],
        )


HINTS = get_type_hints(Settings)


def flag_fields() -> list[tuple[Field[Any], Flag]]:
    """Every setting with what its flag shows, in the order of declaration."""
    return [(item, item.metadata["flag"]) for item in fields(Settings)]


def flag_name(name: str) -> str:
    """ "max_num_seqs" -> "--max-num-seqs"."""
    return "--" + name.replace("_", "-")


def env_name(name: str) -> str:
    """ "max_num_seqs" -> "ROPEWAY_MAX_NUM_SEQS"."""
    return "ROPEWAY_" + name.upper()


def load_settings(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Merges the three sources and checks every value.

    Args:
        flags: setting name -> text, list of texts or bool, as the command line gave them; "config" names the file.
        environ: the environment.

    Raises: UsageError, one sentence that names the flag, variable or file entry.
    """
    path = flags.get("config") or environ.get(env_name("config"))
    from_file = read_config_file(Path(path)) if path else {}
    values: dict[str, Any] = {}
    for item, shown in flag_fields():
        for source, raw in (
            (flag_name(item.name) if item.name != "model" else "MODEL", flags.get(item.name)),
            (env_name(item.name), environ.get(env_name(item.name))),
            (f"{path}: {item.name.replace('_', '-')}", from_file.get(item.name)),
        ):
            if raw is not None:
                values[item.name] = convert(raw, HINTS[item.name], shown, source)
                break
    settings = Settings(**values)
    check_access(settings)
    check_batch(settings)
    check_gpu(settings)
    return settings


def read_config_file(path: Path) -> dict[str, Any]:
    """A YAML mapping of flag names, with - or _. Raises: UsageError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"--config {path} must hold flag names and values, such as `port: 8000`.")
    known = {item.name for item, _ in flag_fields()}
    entries = {str(name).replace("-", "_"): value for name, value in document.items()}
    for name in entries.keys() - known:
        raise UsageError(unknown_flag(flag_name(name), f"{path}: "))
    return entries


def unknown_flag(name: str, where: str = "") -> str:
    """The sentence for a flag that is not there, with the nearest one that is."""
    if name in NOT_BUILT:
        return f"{where}{name} is not built yet: {NOT_BUILT[name]}."
    known = ["config", *(flag_name(item.name).removeprefix("--") for item, _ in flag_fields())]
    near = difflib.get_close_matches(name.removeprefix("--"), known, n=1, cutoff=0.6)
    hint = f"did you mean --{near[0]}? " if near else ""
    return f"{where}There is no flag {name}; {hint}`ropeway serve --help` lists all."


def convert(raw: Any, hint: Any, shown: Flag, source: str) -> Any:
    """One value of any source -> its type. Raises: UsageError that names the source."""
    if get_origin(hint) in (UnionType, Union):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is tuple:
        parts = raw if isinstance(raw, list) else [raw]
        return tuple(name.strip() for part in parts for name in str(part).split(",") if name.strip())
    if isinstance(raw, (list, dict)):
        raise UsageError(f"{source} takes one value.")
    text = str(raw)
    try:
        value = shown.parse(text) if shown.parse else convert_text(text, hint)
    except ValueError as error:
        raise UsageError(f"{source} {error}, not {shorten(text)}.") from None
    if shown.low is not None and not value >= shown.low:
        raise UsageError(f"{source} must be at least {shown.low:g}, not {shorten(text)}.")
    if shown.high is not None and not value <= shown.high:
        raise UsageError(f"{source} must be at most {shown.high:g}, not {shorten(text)}.")
    return value


def shorten(text: str) -> str:
    """A value as an error shows it."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_access(settings: Settings) -> None:
    """An open server stays on this machine unless the user says otherwise. Raises: UsageError."""
    if settings.no_auth and settings.has_keys:
        raise UsageError("--no-auth contradicts --api-key and --api-key-file; give one or the other.")
    if not settings.has_keys and not settings.no_auth and not is_loopback(settings.host):
        raise UsageError(
            f"--host {settings.host} can be reached from other machines: add --api-key or --api-key-file, or --no-auth "
            "if everybody may use the server."
        )


def check_model_folder(model: str) -> None:
    """What can be said about MODEL before anything loads. Raises: UsageError."""
    path = Path(model)
    if not model or (path.is_dir() and (path / "config.json").exists()):
        return
    if path.is_dir():
        raise UsageError(f"{model} is not a model folder: it has no config.json.")
    if path.exists():
        raise UsageError(f"{model} is a file; give the folder that holds config.json and the weights.")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UsageError(f"There is no folder {model}; give one with a model in it, or the id of a model on the hub.")


def check_batch(settings: Settings) -> None:
    """Limits that contradict each other. Raises: UsageError."""
    if settings.max_num_batched_tokens < settings.max_num_seqs:
        raise UsageError(
            f"--max-num-batched-tokens {settings.max_num_batched_tokens} is less than --max-num-seqs "
            f"{settings.max_num_seqs}: every row needs a token of each step."
        )
    if settings.root_path and (not settings.root_path.startswith("/") or settings.root_path.endswith("/")):
        raise UsageError("--root-path must begin with / and not end with it, such as /llm.")


def check_gpu(settings: Settings) -> None:
    """--deterministic where there is no GPU, which the kernels find only once torch is loaded. Raises: UsageError."""
    if settings.deterministic and (settings.device == "cpu" or (settings.device == "auto" and not has_cuda_driver())):
        raise UsageError(
            "--deterministic needs a GPU; on a CPU logits agree to about 1e-5 without it, so tokens are the same."
        )


def has_cuda_driver() -> bool:
    """Whether the driver's library is there, without which torch finds no GPU. With it there may still be none."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


NOT_BUILT = {
    "--tensor-parallel-size": "a model runs on one device",
    "--pipeline-parallel-size": "a model runs on one device",
    "--data-parallel-size": "start one server per device behind a balancer",
    "--ssl-keyfile": "let a proxy terminate TLS",
    "--ssl-certfile": "let a proxy terminate TLS",
    "--ssl-ca-certs": "let a proxy terminate TLS",
    "--queue-timeout": "--request-timeout counts the time in the queue too",
    "--metrics-compat": "metrics have the prefix ropeway_",
    "--enable-lora": "adapters are not served",
    "--lora-modules": "adapters are not served",
    "--speculative-config": "tokens are decoded one by one",
    "--enable-auto-tool-choice": "requests with tools are always parsed, see --tool-format",
    "--tool-call-parser": "the chat template says which format it is; --tool-format overrides it",
    "--reasoning-parser": "the chat template says which format it is; --reasoning-format overrides it",
}
"""Flags that users of other servers, or readers of the roadmap, may try: each is refused in one sentence."""
