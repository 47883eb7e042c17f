"""Writes a model folder of a real size without weights: config, synthetic tokenizer, chat template.

    python bench/make_model.py llama-8b /tmp/llama-8b      # then: ropeway serve /tmp/llama-8b --load-format dummy

Speed depends on shapes, not on what the weights say, so benchmarks need nobody's checkpoint. The tokenizer is a
byte-level BPE of exactly the model's vocabulary whose merges are enumerated, not learned: "t", "th", "the", ...
"""

import argparse
import sys
from collections import deque
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config

LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
SPECIALS = ["<|begin|>", "<|end|>", "<|turn|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: object) -> LlamaConfig:
    """A Llama shape; sizes as in its config."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        **({"max_position_embeddings": 8192, "tie_word_embeddings": False} | more),
    )


def qwen3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool) -> Qwen3Config:
    """A Qwen3 shape; head size 128, vocabulary 151,936."""
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=40_960,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "llama-8b": lambda: llama(4096, 14336, 32, 32, 8, 128_256, max_position_embeddings=131_072),
    "llama-125m": lambda: llama(768, 2048, 12, 12, 4, 32_000, max_position_embeddings=2048, tie_word_embeddings=True),
    "llama-tiny": lambda: llama(64, 128, 2, 4, 2, 2048, max_position_embeddings=2048),
    "qwen3-0.6b": lambda: qwen3(1024, 3072, 28, 16, 8, True),
    "qwen3-8b": lambda: qwen3(4096, 12288, 36, 32, 8, False),
    "qwen3-32b": lambda: qwen3(5120, 25600, 64, 64, 8, False),
    "qwen3-tiny": lambda: qwen3(64, 128, 2, 4, 2, True),
}


def synthetic_bpe(size: int) -> Tokenizer:
    """A byte-complete byte-level BPE with exactly `size` ids, the special tokens last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    stems = deque(["Ġ", *LETTERS])
    while len(vocabulary) < size - len(SPECIALS):
        stem = stems.popleft()
        for letter in LETTERS[: size - len(SPECIALS) - len(vocabulary)]:
            vocabulary[stem + letter] = len(vocabulary)
            merges.append((stem, letter))
            stems.append(stem + letter)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    assert tokenizer.get_vocab_size() == size
    return tokenizer


def write_model(shape: str, folder: Path) -> PretrainedConfig:
    """Writes the folder and returns its config. Raises KeyError for an unknown shape."""
    config = SHAPES[shape]()
    bos, end, _ = SPECIALS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=synthetic_bpe(config.vocab_size), bos_token=bos, eos_token=end, pad_token=end
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.dtype = "bfloat16"
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return config


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_model(arguments.shape, arguments.folder)
    print(f"{arguments.shape} written to {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
