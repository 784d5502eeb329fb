"""Splits: where a text is cut, which documents are held out, and that shards hold all text in order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization import making
from tokenization.making import find_cut, is_val, shards_of, split_pieces


class Pieces:
    """A corpus of given documents, each a list of pieces."""

    name = "pieces"

    def __init__(self, documents):
        self.pieces = [(text, i == len(texts) - 1) for texts in documents for i, text in enumerate(texts)]

    def read(self):
        for text, ends in self.pieces:
            yield text, ends, None


DOCUMENTS = st.lists(
    st.lists(st.text("ab \n", min_size=1, max_size=9), min_size=1, max_size=4), min_size=1, max_size=40
)


@pytest.mark.parametrize("length", [1, 9, 10, 11, 1000, 1001, 1_115_394])
def test_one_document_is_cut_where_nanogpt_cuts_it(length):
    assert find_cut(Pieces([["x" * length]]), 0.1) == int(length * 0.9)
    assert find_cut(Pieces([["x" * (length - length // 2), *["x" * (length // 2)] * (length > 1)]]), 0.1) == int(
        length * 0.9
    )


def test_several_documents_are_not_cut_and_none_is_refused():
    assert find_cut(Pieces([["ab", "cd"], ["e"]]), 0.1) is None
    with pytest.raises(ValueError, match="corpus=pieces: there is no text in it"):
        find_cut(Pieces([]), 0.1)


@pytest.mark.parametrize("fraction", [0.0005, 0.01, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.9, 0.999, 1e-9])
def test_documents_held_out_are_evenly_spaced_and_the_share_asked_for(fraction):
    count = 20_000
    places = [i for i in range(count) if is_val(i, fraction)]
    assert places[0] == 1
    assert abs(len(places) - count * fraction) <= 1
    gaps = {b - a for a, b in zip(places, places[1:], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    for documents in range(2, 50):  # however few there are, both splits have one
        assert 0 < sum(is_val(i, fraction) for i in range(documents)) < documents


def test_a_tenth_is_every_tenth():
    assert [i for i in range(45) if is_val(i, 0.1)] == [1, 11, 21, 31, 41]  # no rounding moves one


@settings(deadline=None, derandomize=True, max_examples=300)
@given(DOCUMENTS, st.integers(1, 30), st.booleans(), st.sampled_from([0.1, 0.5, 0.3]))
def test_shards_hold_all_text_in_order(documents, size, whole, fraction):
    size, making.SHARD = making.SHARD, size
    try:
        cut = find_cut(Pieces(documents), fraction)
        shards = list(shards_of(split_pieces(Pieces(documents), cut, fraction, whole)))
        texts = ["".join(pieces) for pieces in documents]
        for split in ("train", "val"):
            found, held = [], ""
            for shard in shards:
                for which, text, ends in shard:
                    assert text
                    if which == split:
                        held += text
                        if ends:
                            found.append(held)
                            held = ""
            if cut is None:
                assert (
                    found == [t for i, t in enumerate(texts) if is_val(i, fraction) == (split == "val")] and not held
                )
            else:
                assert not found and held == {"train": texts[0][:cut], "val": texts[0][cut:]}[split]
        if whole:
            pieces = [piece for shard in shards for piece in shard]
            assert len(pieces) == (len(texts) if cut is None else (cut > 0) + (cut < len(texts[0])))
        sizes = [sum(len(text) for _, text, _ in shard) for shard in shards]
        assert all(each >= making.SHARD for each in sizes[:-1])
    finally:
        making.SHARD = size
