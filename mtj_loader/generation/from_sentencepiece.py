"""Builds a tokenizer from SentencePiece's tokenizer.model.

The rules are those of the tokenizer classes of transformers 5, also where the `sentencepiece`
library has others.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mtj_loader.errors import FormatError, TokenizerMissingError
from mtj_loader.formats.sentencepiece import ModelType, PieceType, SentencePieceModel
from mtj_loader.generation.added_tokens import TokenSettings
from mtj_loader.generation.tokenizer_files import backend_errors

PLAIN = "TokenizersBackend"

# The classes, with their special tokens by role unless the checkpoint has others. None: those of
# the tokenizer.model.
CLASSES: Mapping[str, Mapping[str, str] | None] = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    PLAIN: None,
}

_MAX_MERGES = 6_000_000  # ten times Gemma 2's
_SPACE = "▁"  # SentencePiece's spelling of a space


def build(
    model: SentencePieceModel, kind: str, settings: TokenSettings, *, file: object
) -> Tokenizer:
    """Builds a tokenizer, without its added tokens, and unless it is plain without its steps.

    Args:
      model: tokenizer.model.
      kind: one of `CLASSES`.
      settings: the added tokens of the checkpoint.
      file: for messages.

    Raises:
      TokenizerMissingError: there are no rules for this kind of model.
      FormatError: the parts of the model do not fit together.
    """
    plain = kind == PLAIN
    types = (ModelType.BPE, ModelType.UNIGRAM) if plain else (ModelType.BPE,)
    if model.model_type not in types:
        raise TokenizerMissingError(
            f"{kind} cannot read a SentencePiece model of this type",
            file=file,
            expected=" or ".join(type_.name for type_ in types),
            found=model.model_type.name,
            hint="pass token ids",
        )
    with backend_errors("the tokenizer cannot be built", file=file):
        return _plain(model, settings, file) if plain else Tokenizer(_bpe(model, {}, file))


def set_steps(tokenizer: Tokenizer, kind: str, config: Mapping[str, object]) -> None:
    """Sets the steps before and after the model.

    Args:
      tokenizer: is changed.
      kind: `LlamaTokenizer` or `GemmaTokenizer`.
      config: tokenizer_config.json, for its `legacy` and `add_prefix_space`.
    """
    core = tokenizer.model
    assert isinstance(core, models.BPE), "these classes have no other model"
    core.byte_fallback = core.fuse_unk = True
    if kind == "GemmaTokenizer":
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        tokenizer.decoder = decoders.Sequence(_decoding_steps())
        return
    core.unk_token = None
    # LlamaTokenizer puts a space before the text, and with `legacy` also after special tokens.
    add_space = config.get("add_prefix_space") is not False
    first = "always" if config.get("legacy") is True else "first"
    steps = [*_decoding_steps(), decoders.Strip(" ", 1, 0)] if add_space else _decoding_steps()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme=first if add_space else "never", split=False
    )
    tokenizer.decoder = decoders.Sequence(steps)


def own_tokens(model: SentencePieceModel) -> list[AddedToken]:
    """The pieces that are never split: control tokens are special, symbols of the user are not."""
    types = PieceType.CONTROL, PieceType.USER_DEFINED
    return [
        AddedToken(piece.text, normalized=False, special=piece.type is PieceType.CONTROL)
        for piece in model.pieces
        if piece.type in types
    ]


def _plain(model: SentencePieceModel, settings: TokenSettings, file: object) -> Tokenizer:
    """TokenizersBackend: what the file says, but no space is added."""
    if model.model_type is ModelType.BPE:
        core = _bpe(model, _renamed(model, settings), file)
    else:
        scores = [(piece.text, piece.score) for piece in model.pieces]
        core = models.Unigram(scores, model.unk_id, model.byte_fallback)
    tokenizer = Tokenizer(core)
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    if model.byte_fallback:
        tokenizer.decoder = decoders.Sequence(_decoding_steps())
    else:
        tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " ")])
    return tokenizer


def _renamed(model: SentencePieceModel, settings: TokenSettings) -> dict[int, str]:
    """The checkpoint's names for the ids of placeholders."""
    texts = {piece.text for piece in model.pieces}
    return {
        number: token.content
        for number, token in settings.numbered.items()
        if number < len(model.pieces) and token.content not in texts
    }


def _bpe(model: SentencePieceModel, renamed: Mapping[int, str], file: object) -> models.BPE:
    vocab = {piece.text: number for number, piece in enumerate(model.pieces)}
    return models.BPE(
        {renamed.get(number, text): number for text, number in vocab.items()},
        find_merges(vocab, file=file),
        unk_token=model.special_tokens.get("unk_token"),
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def find_merges(vocab: Mapping[str, int], *, file: object) -> list[tuple[str, str]]:
    """The merges that SentencePiece's BPE has: any two tokens whose texts make a third.

    A token with a smaller id is made first; of its several merges, the one with the shorter first
    part, as in transformers' `generate_merges`.

    Raises:
      FormatError: there are more than in any real vocabulary; `file` is named.
    """
    shared = {text: text for text in vocab}  # all merges share the strings, to save memory
    merges = []
    for text in sorted(vocab, key=vocab.__getitem__):
        parts = ((shared.get(text[:cut]), shared.get(text[cut:])) for cut in range(1, len(text)))
        merges += [(first, second) for first, second in parts if first and second]
        if len(merges) > _MAX_MERGES:
            expected = f"at most {_MAX_MERGES:,}"
            raise FormatError("the pieces form too many merges", file=file, expected=expected)
    return merges


def _decoding_steps() -> list[decoders.Decoder]:
    return [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
