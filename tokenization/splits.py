"""Which text is for training and which for validation: decided while it streams past, the same on every machine."""

from collections.abc import Iterator
from fractions import Fraction

BATCH = 2**19  # characters that are tokenized at a time, at least

SplitPiece = tuple[str, str, bool]  # split, text, whether it ends a document


def find_cut(corpus, val_fraction: float) -> int | None:
    """Where a single document is cut into train and val, in characters: nanoGPT's int(0.9 * len).

    None where there are several documents, which stay whole; raises ValueError where there is none.
    """
    characters = documents = 0
    for text, ends in corpus.read():
        if documents:
            return None
        characters += len(text)
        documents += ends
    if not documents:
        raise ValueError(f"corpus={corpus.name}: there is no text in it")
    return int(characters * (1 - Fraction(str(val_fraction))))


def is_val(document: int, val_fraction: float) -> bool:
    """Whether the document of this number, from 0, is for validation: the second, then evenly spaced ones.

    So both splits have one as soon as there are two, and no later document has a say.
    """
    over, under = Fraction(str(val_fraction)).as_integer_ratio()
    return -(-document * over // under) > -((1 - document) * over // under)


class Splitter:
    """Pieces of text as batches of pieces of one split each, with the state from which the next batch goes on."""

    def __init__(self, corpus, cut: int | None, val_fraction: float, whole: bool, state: dict | None = None):
        """`whole` joins the pieces of a document (or of each half of a single one) for tokenizers that need it."""
        self.corpus, self.cut, self.val_fraction, self.whole = corpus, cut, val_fraction, whole
        self.state = state or {"corpus": None, "documents": 0, "characters": 0}

    def batches(self) -> Iterator[tuple[list[SplitPiece], dict | None]]:
        """Batches of at least BATCH characters; the state is None where a document is still to be joined."""
        documents, characters = self.state["documents"], self.state["characters"]
        batch, size = [], 0
        for text, ends in self.corpus.read(self.state["corpus"]):
            batch += self.split(text, ends, documents, characters)
            documents, characters, size = documents + ends, characters + len(text), size + len(text)
            if size >= BATCH and (ends or not self.whole):
                yield (
                    join(batch) if self.whole else batch,
                    {"corpus": self.corpus.state, "documents": documents, "characters": characters},
                )
                batch, size = [], 0
        if batch:
            yield join(batch) if self.whole else batch, None

    def split(self, text: str, ends: bool, documents: int, characters: int) -> list[SplitPiece]:
        """A piece, cut in two where the cut goes through it. A single document was cut by position: no half ends."""
        if self.cut is None:
            return [("val" if is_val(documents, self.val_fraction) else "train", text, ends)]
        at = min(max(self.cut - characters, 0), len(text))
        return [(split, part, False) for split, part in (("train", text[:at]), ("val", text[at:])) if part]


def join(pieces: list[SplitPiece]) -> list[SplitPiece]:
    """The pieces of each document joined."""
    joined = []
    for split, text, ends in pieces:
        if joined and joined[-1][0] == split and not joined[-1][2]:
            joined[-1][1].append(text)
            joined[-1][2] = ends
        else:
            joined.append([split, [text], ends])
    return [(split, "".join(texts), ends) for split, texts, ends in joined]
