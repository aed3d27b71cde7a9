"""Token ids of a prompt: Z-Image's chat template, Qwen's tokenizer, at most 512 tokens.

The reference (diffusers `ZImagePipeline`) puts the prompt into a template string and tokenises the
whole. Here the template's special tokens are ids and the prompt is encoded separately, so that a
literal "<|im_end|>" in a prompt remains text; all other prompts get the same ids. A prompt that is
too long loses its end, never the tail of the template.

Axes: B prompts, T tokens, N characters.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from tokenizers import Tokenizer

from ..errors import CheckpointError
from ..files import LARGEST_JSON, printable, read_regular

MAX_TOKENS = 512
_LONGEST_TOKEN = 128  # characters; Qwen's longest token is a run of spaces


@dataclass(frozen=True)
class Encoded:
    """A prompt's token ids."""

    ids: tuple[int, ...]
    cut: str  # the end of the prompt that did not fit, or ""
    weights: tuple[float, ...] = ()  # of each token; () if all are 1
    neutral: tuple[int, ...] = ()  # ids with a comma for each token whose weight is not 1; or ()


class Prompts:
    """A checkpoint's tokenizer with Z-Image's template around it."""

    def __init__(self, tokenizer: Tokenizer, where: str = "tokenizer.json"):
        tokenizer.encode_special_tokens = True  # text like a special token's is encoded as text
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        start, end = (self._special(token, where) for token in ("<|im_start|>", "<|im_end|>"))
        self._head = [start]
        self._tail = [end, *self._text("\n").ids, start, *self._text("assistant\n").ids]

    @classmethod
    def load(cls, path: Path) -> "Prompts":
        """From a tokenizer.json. Raises CheckpointError if it is missing, too large or not a
        tokenizer."""
        return cls.parse(read_regular(path, LARGEST_JSON, CheckpointError), str(path))

    @classmethod
    def parse(cls, data: bytes, where: str = "tokenizer.json") -> "Prompts":
        """From the bytes of a tokenizer.json. Raises CheckpointError if they are not a tokenizer.

        `where` begins each message.
        """
        try:
            return cls(Tokenizer.from_buffer(data), where)
        except CheckpointError:
            raise
        except Exception as fault:  # the library raises plain Exception
            raise CheckpointError(
                f"{where}: not a tokenizer.json of the tokenizers library ({printable(fault)})"
            ) from None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size()

    def _special(self, token: str, where: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise CheckpointError(
                f"{where}: expected Qwen's special tokens, {token} is not among its tokens"
            )
        return index

    def _text(self, text: str):
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode(
        self,
        prompt: str,
        max_tokens: int = MAX_TOKENS,
        weights: Float[np.ndarray, "N"] | None = None,
    ) -> Encoded:
        """Ids of the prompt in its template, at most `max_tokens`.

        `weights`: of each character of the prompt. A token has the mean over its characters but
        spaces, because the space before a word belongs to the word's token; the template's tokens
        have 1.
        """
        # one text: the template's newline may merge with a prompt that begins with a newline
        whole = "user\n" + prompt
        # max_tokens cannot hold more characters, and a huge prompt would take a minute
        user = self._text(whole[: (max_tokens + 1) * _LONGEST_TOKEN])
        room = max_tokens - len(self._head) - len(self._tail)
        cut = whole[user.offsets[room][0] :] if len(user.ids) > room else ""
        ids = (*self._head, *user.ids[:room], *self._tail)
        if weights is None or (weights == 1).all():
            return Encoded(ids, cut)
        by_character = np.concatenate([np.ones(len(whole) - len(prompt)), weights])
        own = [_mean(whole, by_character, *span) for span in user.offsets[:room]]
        of_tokens = (*(1.0 for _ in self._head), *own, *(1.0 for _ in self._tail))
        if all(weight == 1 for weight in of_tokens):  # the words with weights are cut off
            return Encoded(ids, cut)
        comma = self._text(",").ids[0]
        neutral = (i if w == 1 else comma for i, w in zip(ids, of_tokens, strict=True))
        return Encoded(ids, cut, of_tokens, tuple(neutral))


def _mean(text: str, weights: Float[np.ndarray, "N"], start: int, end: int) -> float:
    """The mean weight of characters `start` to `end` but spaces; of spaces alone, of all."""
    seen = [i for i in range(start, end) if not text[i].isspace()] or list(range(start, end))
    if not seen:
        return 1.0
    first = float(weights[seen[0]])  # the mean of equal weights is that weight, to the bit
    return first + float(np.mean(weights[seen] - first))


def bucket(tokens: int) -> int:
    """The padded length of a caption of `tokens`: 32, 64, 128, …, so that few programs compile."""
    size = 32
    while size < tokens:
        size *= 2
    return size


def batch_ids(
    encoded: list[Encoded], size: int | None = None
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Ids, padded at the end to `size`, by default the bucket of the longest prompt, and each
    prompt's length."""
    lengths = np.array([len(e.ids) for e in encoded], np.int32)
    ids = np.zeros((len(encoded), size or bucket(int(lengths.max()))), np.int32)
    for row, e in zip(ids, encoded, strict=True):
        row[: len(e.ids)] = e.ids
    return ids, lengths
