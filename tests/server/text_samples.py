"""Small tokenizers of the kinds that models use, and texts that break careless detokenizers."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "Hello, world! This is a test of the tokenizer.",
    " two leading spaces, a\ttab,\nlines\r\n\n",
    "日本語のテキスト。漢字かな交じり文、中文字符",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "\U0001f3f3\ufe0f\u200d\U0001f308 flag, \U0001f44d\U0001f3fd thumb, \U0001f937\U0001f3fb\u200d\u2640\ufe0f",
    "مرحبا بالعالم، שלום עולם",
    "naïve café, Zoë, cœur, e\u0301 combining",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🀄 𐍈 beyond the basic plane",  # noqa: RUF001
    "line\u2028separator\u2029paragraph\x85next",
]
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: BPE over bytes. Characters of other scripts are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2, Mistral and Gemma: sentencepiece BPE, spaces are U+2581, unknown characters are bytes."""
    letters = "▁abcdefghijklmnopqrstuvwxyz,.日本"
    words = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("o", "r")]
    names = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(a + b for a, b in words)]
    vocabulary = {name: id for id, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=words, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5: a unigram vocabulary with spaces as U+2581 and nothing for unknown characters."""
    pieces = [("<unk>", 0.0), *((char, -2.0) for char in "▁abcdefghijklmnopqrstuvwxyz"), ("▁the", -1.0), ("日", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def word_piece() -> Tokenizer:
    """A decoder that looks at neighbours: "##" joins, and spaces before punctuation go."""
    names = ["[UNK]", *SPECIALS, *"abcdefgh.,日", *("##" + char for char in "abcdefgh日")]
    tokenizer = Tokenizer(models.WordPiece({name: id for id, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def word_piece_bytes() -> Tokenizer:
    """Neighbours and byte fallback together: tokenizers' own stream raises on most random ids of it."""
    tokenizer = word_piece()
    tokenizer.add_tokens([f"<0x{byte:02X}>" for byte in range(256)])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.WordPiece(cleanup=False)])
    return tokenizer
