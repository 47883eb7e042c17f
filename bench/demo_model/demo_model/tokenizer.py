"""Train the demo model's tokenizer and write its files into the model folder.

    cd bench/demo_model && python -m demo_model.tokenizer

A byte-level BPE that knows every byte, with every digit a token of its own.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from demo_model.corpus import documents
from demo_model.turns import END_TURN, MARKER_TOKENS, PAD, SPECIAL_TOKENS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[3]
MODEL_FOLDER = ROOT / "server" / "demo_model"
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
VOCABULARY = 2560
CONTEXT = 2048


def training_text(count: int, seed: int) -> Iterator[str]:
    """Corpus documents without their markers, which never take part in merges."""
    for document in islice(documents(seed), count):
        for marker in (*SPECIAL_TOKENS, *MARKER_TOKENS):
            document = document.replace(marker, "\n")
        yield document


def train_tokenizer(count: int, seed: int) -> Tokenizer:
    """The trained tokenizer with its markers: turns are special, tool calls and thoughts stay visible."""
    tokenizer = Tokenizer(models.BPE())
    parts: list[PreTokenizer] = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKER_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(count, seed), trainer)
    tokenizer.add_tokens(list(MARKER_TOKENS))
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TURN,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE.read_text()
    wrapped.save_pretrained(folder)


def main() -> None:
    """Train on the corpus and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER)
    options = parser.parse_args()
    tokenizer = train_tokenizer(options.documents, options.seed)
    save(tokenizer, options.out)
    print(f"{tokenizer.get_vocab_size()} tokens -> {options.out}")


if __name__ == "__main__":
    main()
