"""Prompts as token ids that can fit the model: from texts that no template makes, and cut to their ends.

Knows lengths, the tokenizer and the fields that name them; no protocol's shape, no sampling.
"""

from ropeway.scheduler.messages import ModelInfo
from ropeway.server.presets import AnyFields
from ropeway.server.sampling import context_error
from ropeway.server.sampling_fields import SamplingFields
from ropeway.server.services import Services


def context_length(info: ModelInfo) -> int:
    """Most tokens of prompt and output: the model's, or the whole KV cache if that is smaller (block 0 is reserved)."""
    return min(info.max_model_len, (info.num_blocks - 1) * info.block_size)


def check_could_fit(services: Services, characters: int, param: str) -> None:
    """Refuses a prompt by its length alone: tokenizing megabytes only to refuse them would cost everybody.

    Raises: ApiError 400 `context_length_exceeded`.
    """
    least = characters // services.tokenizer.longest_token
    context = context_length(services.require_loaded())
    if least > context:
        raise context_error(least, 1, context, param, at_least=True)


async def encode_prompt(
    services: Services, prompt: str | list[int], fields: SamplingFields, param: str = "prompt"
) -> list[int]:
    """Token ids of a text that no template makes. Raises: ApiError 400 for one that is far too long."""
    if isinstance(prompt, list):
        return prompt
    if fields.truncate_prompt_tokens is None:
        check_could_fit(services, len(prompt), param)
    return await services.tokenizer.encode([prompt], add_special_tokens=True)


async def with_negative_ids(services: Services, fields: AnyFields) -> AnyFields:
    """The fields, a text to lead away from tokenized. Raises: ApiError 400 for one that is far too long."""
    if not fields.negative_prompt:
        return fields
    check_could_fit(services, len(fields.negative_prompt), "negative_prompt")
    ids = await services.tokenizer.encode([fields.negative_prompt], add_special_tokens=True)
    return fields.model_copy(update={"negative_prompt_ids": ids})


def truncated(prompt_ids: list[int], fields: SamplingFields, context: int) -> list[int]:
    """The prompt's last tokens, as many as `truncate_prompt_tokens` keeps; -1 leaves room for the output asked for."""
    keep = fields.truncate_prompt_tokens
    if keep is None:
        return prompt_ids
    if keep < 0:
        keep = max(context - (fields.most_tokens(0) or 1), 1)
    return prompt_ids[-keep:]
