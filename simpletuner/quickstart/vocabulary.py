"""The words of the quickstart's captions, and a CLIP tokenizer in which each of them is one token."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (240, 126, 28),
    "yellow": (250, 216, 60),
    "green": (44, 150, 72),
    "blue": (40, 88, 204),
    "purple": (140, 60, 176),
    "black": (26, 26, 30),
    "white": (246, 246, 242),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
SIZES: dict[str, float] = {"small": 21.0, "medium": 28.0, "large": 36.0}
"""Diameter of a circle in pixels; the other shapes are about as heavy."""
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
RELATIONS = ("left of", "right of", "above", "below")
TEXTURES = ("plain", "graded", "striped", "checked")
"""Of backgrounds. Captions name all but the first."""
_GLUE = ("a", "an", "and", "at", "background", "in", "of", "on", "photo", "picture", "the", "with")
_RELATION_WORDS = " ".join(RELATIONS).split()

WORDS = tuple(sorted({*COLORS, *SHAPES, *SIZES, *ROWS, *COLUMNS, *_RELATION_WORDS, *TEXTURES, *_GLUE}))
_START, _END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(pad_token: str = _END) -> "CLIPTokenizer":
    """Returns a byte-level CLIP tokenizer of 77 tokens: any text can be written, and our words are single tokens.

    The order of ids is CLIP's: bytes, bytes that end a word, merges, start, end; the end is the highest id.
    """
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    merges = _merges(WORDS)
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), _START, _END])
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=list(merges),  # pyright: ignore[reportArgumentType]  (pairs are what tokenizers' BPE takes)
        pad_token=pad_token,
        model_max_length=77,
    )


def _merges(words: Iterable[str]) -> dict[tuple[str, str], None]:
    """Returns pairs in order of rank, by which byte pair encoding makes each word one token.

    A word first gets what the merges so far make of it, since these go before its own; its own cannot disturb earlier
    words, whose merges all have lower ranks.
    """
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            for index in range(len(parts) - 2, -1, -1):
                if (parts[index], parts[index + 1]) == pair:
                    parts[index : index + 2] = ["".join(pair)]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts[:2] = ["".join(parts[:2])]
    return merges


def _byte_letters() -> list[str]:
    """Returns the 256 printable characters that stand for bytes in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]
