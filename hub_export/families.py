"""The three families of published models: how a base is recognised, tokenised and prompted."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .confine import CheckpointError, read_json, reading, require_confined, require_no_pointer

# The chat templates write `<image>` of a user's text with this character, a noncharacter of Unicode, after the `<`, so that it is no
# placeholder; the normalizer takes it out again.
BREAK = normalizers.Replace("\ufdd0", "")
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """
    What the published scripts do with one kind of base.

    Args:
        template (`str`): Name of the chat template.
        always_adds_image_tokens (`bool`): Whether the vocabulary grows even without a plugin that draws.
        prefix_space (`bool`): Whether `<s>` and a space before every text chunk (SentencePiece) belong to a prompt; the chat
            template writes them.
    """

    template: str
    always_adds_image_tokens: bool
    prefix_space: bool

    @property
    def chat_template(self) -> str:
        return (Path(__file__).parent / "templates" / f"{self.template}.jinja").read_text()


FAMILIES = {
    ("phi3", "LlamaTokenizer"): Family("phi3_instruct", always_adds_image_tokens=True, prefix_space=True),
    ("phi3", "GPT2Tokenizer"): Family("phi4_instruct", always_adds_image_tokens=True, prefix_space=False),
    ("qwen2", "Qwen2Tokenizer"): Family("qwen_2", always_adds_image_tokens=False, prefix_space=False),
}


def family_of(base: Path) -> Family:
    """
    The family of a base directory, from its `config.json` and `tokenizer_config.json`.

    Raises:
        CheckpointError: if the base is none that HealthGPT was published for.
    """
    require_confined(base)
    model_type = str(read_json(base / "config.json").get("model_type"))
    tokenizer_class = str(read_json(base / "tokenizer_config.json").get("tokenizer_class")).removesuffix("Fast")
    if (model_type, tokenizer_class) not in FAMILIES:
        known = ", ".join(f"{model} with {tokenizer}" for model, tokenizer in FAMILIES)
        raise CheckpointError(f"{base} is a {model_type} with {tokenizer_class}; HealthGPT has bases of {known}.")
    return FAMILIES[model_type, tokenizer_class]


def build_tokenizer(base: Path) -> PreTrainedTokenizerFast:
    """
    A fast tokenizer that gives the ids of the slow tokenizer of 2024, with which the weights were trained.

    It is built from the slow tokenizer's own files, since the fast ones of the same repositories differ: Phi-4's splits
    numbers in another way, Phi-3's treats spaces before special tokens differently. The space that SentencePiece puts
    before every text is left to the chat template, which knows where a text chunk starts.

    Args:
        base (`Path`): Directory with `tokenizer_config.json` and either `tokenizer.model` or `vocab.json`, `merges.txt`.

    Raises:
        CheckpointError: if a file is missing or damaged, or the added tokens do not get their published ids.
    """
    config = read_json(base / "tokenizer_config.json")
    with reading(base / "tokenizer_config.json"):
        added = {int(key): AddedToken(**token) for key, token in config.get("added_tokens_decoder", {}).items()}
        names = {key: config.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        names = {key: name["content"] if isinstance(name, dict) else name for key, name in names.items() if name}
        tokenizer_class = config["tokenizer_class"].removesuffix("Fast")
    if tokenizer_class == "LlamaTokenizer":
        tokenizer = _sentencepiece(base / "tokenizer.model", names.get("unk_token"))
    else:
        tokenizer = _byte_level(base, tokenizer_class)
    with reading(base / "tokenizer_config.json"):
        for token_id, token in sorted(added.items()):
            tokenizer.add_tokens([token])
            if tokenizer.token_to_id(token.content) != token_id:
                raise CheckpointError(
                    f"{base / 'tokenizer_config.json'} gives {token.content!r} the id {token_id}, but the vocabulary leads "
                    f"to {tokenizer.token_to_id(token.content)}."
                )
        if config.get("add_bos_token"):
            bos = names["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            padding_side="left",
            model_max_length=config.get("model_max_length"),
            clean_up_tokenization_spaces=False,
            **names,
        )


def _sentencepiece(path, unk_token):
    """A byte-pair tokenizer with SentencePiece's pieces; of two merges the one with the better score goes first."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise CheckpointError(
            f"Reading {path} needs the package sentencepiece: pip install healthgpt[export]."
        ) from None
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    require_no_pointer(path)
    with reading(path):  # pieces of a damaged model, and what is said of it, need not be UTF-8
        model = SentencePieceProcessor(model_file=str(path))
        pieces = {model.id_to_piece(index): index for index in range(len(model))}
    ranked = []
    for piece, index in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                ranked.append((-model.get_score(index), pieces[left], pieces[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    tokenizer = Tokenizer(BPE(pieces, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([BREAK, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _byte_level(base, tokenizer_class):
    for name in ("vocab.json", "merges.txt"):
        if not (base / name).is_file():
            raise CheckpointError(f"{base / name} does not exist.")
        require_no_pointer(base / name)
    try:
        vocab, merges = BPE.read_file(str(base / "vocab.json"), str(base / "merges.txt"))
        tokenizer = Tokenizer(BPE(vocab, merges))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{base / 'vocab.json'} and merges.txt are no byte-pair vocabulary: {error}.") from error
    if tokenizer_class == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.Sequence([BREAK, normalizers.NFC()])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.normalizer = BREAK
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def add_image_tokens(tokenizer: PreTrainedTokenizerFast, num_codes: int) -> None:
    """Adds what a drawn picture is written with, in the published order; the ids start at `len(tokenizer)`."""
    names = ["<start_index>", *(f"<idx_{index}>" for index in range(num_codes)), "<end_index>", "<pixel_newline>"]
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])


def add_image_placeholder(tokenizer: PreTrainedTokenizerFast) -> int:
    """Adds `<image>`, which stands for one patch of an input picture, and returns its id."""
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids("<image>")
