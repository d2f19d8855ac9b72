"""Tokenizers of the kinds that models have, small, trained on our own text and a little Chinese and code."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHINESE = "西游记的作者是吴承恩。红楼梦的作者是曹雪芹。中国的首都是北京。日本的首都是东京。"
CODE = "def area(w, h):\n    return w * h\n\n\nclass Box:\n    def __init__(self):\n        self.side = 3\n"
# As in its tokenizer.json.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    text: str, front: tuple[str, ...] = (), behind: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """GPT-2's kind. `front` and `behind` are what the post-processor adds to a text, of <s> and <end>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, text, pre_tokenizers.ByteLevel.alphabet(), front, behind)


def qwen_like(text: str) -> PreTrainedTokenizerFast:
    """Qwen's kind: NFC, its own words, bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(_QWEN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, text, pre_tokenizers.ByteLevel.alphabet())


def sentencepiece_like(text: str) -> PreTrainedTokenizerFast:
    """Llama 2's kind: a space before the first word, bytes for characters that it does not know, <s> in
    front.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
    )  # fmt: skip
    return _trained(tokenizer, text, [f"<0x{byte:02X}>" for byte in range(256)], ("<s>",))


def _trained(
    tokenizer: Tokenizer,
    text: str,
    alphabet: list[str],
    front: tuple[str, ...] = (),
    behind: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    has_bytes = alphabet[0].startswith("<0x")  # tokens of their own, which the trainer takes for special ones
    special = ["<unk>", "<s>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special + (alphabet if has_bytes else []),
        initial_alphabet=[] if has_bytes else alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([text, *[CHINESE] * 30, *[CODE] * 30], trainer)
    if has_bytes:
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
        tokenizer = Tokenizer.from_str(json.dumps(content))
    if front or behind:
        template = " ".join([*front, "$A", *behind])
        numbers = [(token, tokenizer.token_to_id(token)) for token in {*front, *behind}]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<end>", pad_token="<end>"
    )
