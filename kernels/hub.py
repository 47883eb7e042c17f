"""Whether a hub id can be had, asked once. Knows ids and the hub's cache; loads nothing.

transformers asks for each file six times with growing pauses: without a network a mistyped id took 20 to 50 s.
"""

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from ropeway.kernels.errors import NotAModel

ANSWER_SECONDS = 5.0


def check_hub(model: str, revision: str | None) -> None:
    """Passes a hub id whose config is in the cache or on the hub.

    Raises:
        NotAModel: neither, or the hub does not answer in time; one sentence that says which.
    """
    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        raise NotAModel(f"{model!r} is neither a folder here nor a hub id, such as organisation/name.") from None
    if isinstance(cached, str) or constants.HF_HUB_OFFLINE:  # offline, transformers says at once what it lacks
        return
    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json", revision=revision), timeout=ANSWER_SECONDS)
    except RepositoryNotFoundError:  # also a private or gated one
        raise NotAModel(
            f"There is no folder {model}, and the hub has no such model; if it is private or gated, set HF_TOKEN."
        ) from None
    except RevisionNotFoundError:
        raise NotAModel(f"The hub has no revision {revision} of {model}.") from None
    except EntryNotFoundError:
        raise NotAModel(f"{model} on the hub is not a model: it has no config.json.") from None
    except Exception as error:  # each library below the hub's client has exceptions of its own
        raise NotAModel(
            f"There is no folder {model}, and the hub cannot be asked ({type(error).__name__}: {error})."
        ) from None
