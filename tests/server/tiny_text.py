"""The text side of a model of eight words, as an engine process would have written it."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

WORDS = ["<s>", "</s>", "<unk>", "one", "two", "three", "user", ":"]
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"


def write_text_dir(folder: Path) -> Path:
    """The files an engine would have written, for a tokenizer of eight words."""
    vocabulary = {word: id for id, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.decoder = Fuse()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "special_tokens.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 5}')
    return folder
