"""Windows: a TokenStream against plain slices, and which windows training and evaluation take."""

import copy
import json
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization import windows as windows_module
from tokenization.windows import (
    NO_TARGET,
    TokenStream,
    Windows,
    epoch_windows,
    evaluation_windows,
    open_stream,
    permute,
    training_windows,
)

ROW = 1024


def cut(ids, sizes):
    """The ids as consecutive chunks of these sizes."""
    assert sum(sizes) == len(ids)
    return np.split(ids, np.cumsum(sizes)[:-1])


def sliced_windows(ids, offsets, targets, block_size):
    """What TokenStream.windows should return, one id at a time on a circle of ids."""
    windows = np.full((len(offsets), block_size + 1), NO_TARGET, dtype=np.int64)
    for i, (offset, count) in enumerate(zip(offsets, targets, strict=True)):
        for k in range(count + 1):
            windows[i, k] = ids[(offset + k) % len(ids)]
    return windows


def check_batch(stream, windows, expected):
    """Compare TokenStream.batch with the expected windows: as inputs, which have no -100, and as targets."""
    inputs, targets = stream.batch(windows, expected.shape[1] - 1)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.flags.c_contiguous and targets.flags.c_contiguous
    np.testing.assert_array_equal(inputs, np.where(expected == NO_TARGET, 0, expected)[:, :-1])
    np.testing.assert_array_equal(targets, expected[:, 1:])


def both(windows):
    """Offsets and lengths, each (N,) int64."""
    assert windows.offsets.dtype == windows.lengths.dtype == np.int64
    assert windows.offsets.shape == windows.lengths.shape == (len(windows),)
    return windows.offsets, windows.lengths


def draw(order, seed, step, count, length, block_size):
    """The windows of a step on a stream of this length."""
    stream = range(length)
    return both(training_windows(stream, order=order, seed=seed, step=step, count=count, block_size=block_size))


def whole(stream, length):
    """The first `length` ids of a stream."""
    return stream.windows(np.array([0]), np.array([length - 1]), length - 1)[0]


def write_data_dir(folder, ids, padding, **saving):
    """A data_dir with these ids in both splits, as rows of ROW whose last is filled up with `padding`."""
    filled = np.concatenate([ids, np.full(-len(ids) % ROW, padding, dtype=ids.dtype)])
    rows = datasets.Dataset(pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(filled), ROW)}))
    for split in ("train", "val"):
        rows.save_to_disk(folder / split, **saving)
    (folder / "prepared.json").write_text(json.dumps({"tokens": {"train": len(ids), "val": len(ids)}}))


# ---------------------------------------------------------------------------------------------------------------------
# TokenStream


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize(
    "sizes",
    [[40], [20, 20], [1] * 40, [5, 1, 7, 3, 2, 22], [22, 2, 3, 7, 1, 5], [0, 9, 0, 0, 30, 1, 0]],
    ids=["one", "two", "of one", "rising", "falling", "some empty"],
)
@pytest.mark.parametrize("length", [40, 39, 33, 18], ids=["full", "tail of 1", "tail of 7", "tail of 22"])
def test_windows_are_slices_of_a_circle_at_every_offset_and_width(dtype, sizes, length):
    # ids from the top of the range: a detour through a smaller type would change them; 999 marks the padding
    ids = np.arange(np.iinfo(dtype).max - 39, np.iinfo(dtype).max + 1, dtype=np.int64).astype(dtype)
    ids[length:] = 999
    stream = TokenStream(cut(ids, sizes), length)
    assert len(stream) == length
    offsets = np.arange(length)
    for block_size in (0, 1, 2, 7, 22, 39, 46):
        for targets in {0, 1, block_size // 2, max(block_size - 1, 0), block_size}:
            if targets <= block_size:
                counts = np.full(length, targets)
                windows = stream.windows(offsets, counts, block_size)
                assert windows.dtype == np.int64
                expected = sliced_windows(ids[:length], offsets, counts, block_size)
                np.testing.assert_array_equal(windows, expected)
                for one in range(length):  # of all windows, some go on in another chunk
                    check_batch(stream, Windows(offsets[one:][:2], counts[one:][:2]), expected[one:][:2])


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_any_windows_of_any_chunks_are_slices_of_a_circle(data):
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum))
    length = data.draw(st.integers(1, sum(sizes)))
    block_size = data.draw(st.integers(0, 30))
    stream = TokenStream(cut(np.arange(sum(sizes), dtype=np.uint16), sizes), length)
    offsets = np.array(data.draw(st.lists(st.integers(0, length - 1), max_size=5)), dtype=np.int64)
    targets = np.array([data.draw(st.integers(0, block_size)) for _ in offsets], dtype=np.int64)
    windows = stream.windows(offsets, targets, block_size)
    expected = sliced_windows(np.arange(length), offsets, targets, block_size)
    np.testing.assert_array_equal(windows, expected)
    check_batch(stream, Windows(offsets, targets), expected)


def test_no_offsets_give_no_windows():
    none = np.empty(0, dtype=np.int64)
    stream = TokenStream([np.arange(30, dtype=np.uint16)], 30)
    assert stream.windows(none, none, 4).shape == (0, 5)
    check_batch(stream, Windows(none, none), np.empty((0, 5), dtype=np.int64))


def test_a_window_may_be_written_without_changing_the_stream():
    ids = np.arange(30, dtype=np.uint16)
    stream = TokenStream(cut(ids, [12, 18]), 30)
    for offset in (2, 8):
        inputs, targets = stream.batch(Windows(np.array([offset]), np.array([9])), 9)
        inputs[:] = targets[:] = 0
    np.testing.assert_array_equal(ids, np.arange(30))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_chunks_may_lie_anywhere_in_memory_and_so_may_those_of_a_copy(order, copied):
    memory = np.full(10_000, 7, dtype=np.uint32)  # with 7 where no chunk is
    chunks = []
    for place in order:
        chunks.append(memory[place * 2500 + 13 * place :][:100])
        chunks[-1][:] = np.arange(100) + 100 * len(chunks)
    nothing = np.ndarray(0, dtype=np.uint32, buffer=memory.data, offset=1)  # an empty chunk may lie between two ids
    stream = TokenStream([nothing, *chunks], 390)
    stream.batch(Windows(np.array([0]), np.array([9])), 9)  # now the stream knows where its chunks are
    assert len(pickle.dumps(stream)) < 4 * 390 + 1000  # the chunks, and nothing of what lies between them
    if copied:
        stream = copied(stream)
        memory[:] = 7
    ids = np.arange(100, 490)
    for offsets in ([0, 105, 205, 305, 380], [90, 105, 205], [290], [289]):
        targets = np.full(len(offsets), 9)
        expected = sliced_windows(ids, offsets, targets, 9)
        check_batch(stream, Windows(np.array(offsets), targets), expected)


# ---------------------------------------------------------------------------------------------------------------------
# open_stream


@pytest.mark.parametrize(
    "saving", [{}, {"num_shards": 3}], ids=["one file of several record batches", "several files"]
)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_stream_from_disk_is_the_ids_without_a_copy(tmp_path, monkeypatch, dtype, saving):
    count = 2300 * ROW + 77  # `datasets` writes 1000 rows to a record batch
    ids = np.random.default_rng(0).integers(1, np.iinfo(dtype).max, count, dtype=dtype, endpoint=True)
    write_data_dir(tmp_path, ids, padding=0, **saving)

    opened = []  # what open_stream itself reads: another reading would map the files elsewhere

    def remember(*args):
        opened.append(datasets.load_from_disk(*args))
        return opened[-1]

    monkeypatch.setattr(windows_module, "load_from_disk", remember)
    allocated = pa.total_allocated_bytes()
    stream = open_stream(str(tmp_path), "train")
    assert pa.total_allocated_bytes() - allocated < 2**16  # the files are mapped, not read

    assert len(stream) == count
    buffers = [chunk.flatten().buffers()[1] for chunk in opened[0].data.column("input_ids").chunks]
    assert len(stream._chunks) == len(buffers) > 1
    for chunk, buffer in zip(stream._chunks, buffers, strict=True):
        assert chunk.dtype == dtype
        assert not chunk.flags.writeable
        assert np.shares_memory(chunk, np.frombuffer(buffer, dtype=dtype))

    np.testing.assert_array_equal(whole(stream, count + 1), np.append(ids.astype(np.int64), ids[0]))
    borders = np.cumsum([len(chunk) for chunk in stream._chunks])[:-1]
    offsets = np.concatenate([[0, count - 1], *(borders + shift for shift in (-300, -257, -256, -255, -1, 0, 1))])
    targets = np.full(len(offsets), 256)
    expected = ids.astype(np.int64)[(offsets[:, None] + np.arange(257)) % count]
    np.testing.assert_array_equal(stream.windows(offsets, targets, 256), expected)
    for one in range(len(offsets)):
        check_batch(stream, Windows(offsets[one:][:3], targets[one:][:3]), expected[one:][:3])


def test_each_split_is_a_stream_of_its_own(tmp_path):
    write_data_dir(tmp_path, np.arange(3000, dtype=np.uint16), padding=7)
    other = datasets.Dataset.from_dict(
        {"input_ids": [[5] * ROW]},
        datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"), length=ROW)}),
    )
    other.save_to_disk(tmp_path / "val")
    (tmp_path / "prepared.json").write_text(json.dumps({"tokens": {"train": 3000, "val": 10}}))
    train, val = (open_stream(str(tmp_path), split) for split in ("train", "val"))
    assert train.windows(np.array([2998]), np.array([1]), 3).tolist() == [[2998, 2999, -100, -100]]
    assert val.windows(np.array([0]), np.array([9]), 11).tolist() == [[5] * 10 + [-100] * 2]


# ---------------------------------------------------------------------------------------------------------------------
# training_windows: random


def random_offsets(*arguments):
    offsets, lengths = draw("random", *arguments)
    assert (lengths == arguments[-1]).all()
    return offsets


def test_training_offsets_are_these():
    # Literals: runs that were begun can be resumed, and compared, only while the generator stays what it is.
    first, second = (random_offsets(1337, step, 8, 1_003_854, 256).tolist() for step in (0, 1))
    assert first == [720011, 940031, 187240, 776619, 585524, 608629, 586757, 761730]
    assert second == [141151, 532973, 374575, 53888, 893947, 889790, 938855, 64622]
    late = random_offsets(0, 10**6, 4, 2**33, 1024).tolist()  # offsets that 32 bits do not hold
    assert late == [594181638, 5455991558, 5637093830, 327663482]


def test_training_offsets_are_a_pure_function_of_seed_and_step():
    first = random_offsets(3, 14, 64, 10_000, 32)
    random_offsets(3, 15, 64, 10_000, 32)
    np.random.seed(0)
    again = random_offsets(3, 14, 64, 10_000, 32)
    assert first.dtype == np.int64 and first.shape == (64,)
    np.testing.assert_array_equal(first, again)


def test_more_windows_begin_with_those_of_fewer():
    few, many = (random_offsets(3, 14, count, 10_000, 32) for count in (8, 64))
    np.testing.assert_array_equal(few, many[:8])


def test_no_two_seeds_or_steps_share_a_draw():
    # A stream this long makes a chance collision among 25,600 draws less likely than 2**-30, while steps (or seeds)
    # that shift one sequence of draws instead of having their own would repeat nearly all of them.
    draws = [random_offsets(seed, step, 64, 2**62, 1) for seed in range(10) for step in (*range(38), 10**6, 10**9)]
    assert len(np.unique(draws)) == 10 * 40 * 64


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("places", [1, 2, 3, 7])
def test_training_windows_start_everywhere_and_end_within_the_stream(places, block_size):
    length = block_size + places  # a window takes block_size + 1 tokens: the last one starts at places - 1
    offsets = np.concatenate([random_offsets(0, step, 50, length, block_size) for step in range(20)])
    assert set(offsets.tolist()) == set(range(places))
    stream = TokenStream([np.arange(length, dtype=np.uint16)], length)
    windows = stream.windows(offsets, np.full(len(offsets), block_size), block_size)
    np.testing.assert_array_equal(windows, offsets[:, None] + np.arange(block_size + 1))  # none goes round


def test_training_offsets_are_what_a_new_generator_draws():
    for step in (3, 0, 10**9, 2, 3):  # whatever was drawn before
        for seed in (7, 0, 2**32 - 1):
            draws = np.random.Philox(key=seed, counter=[0, step, 0, 0]).random_raw(7) % np.uint64(1000 - 16)
            assert random_offsets(seed, step, 7, 1000, 16).tolist() == draws.tolist()


def test_training_offsets_are_uniform():
    bins, draws = 100, 100_000
    offsets = np.concatenate([random_offsets(5, step, 100, 50_000 + 256, 256) for step in range(draws // 100)])
    counts = np.bincount(offsets * bins // 50_000, minlength=bins)
    chi_square = ((counts - draws / bins) ** 2 / (draws / bins)).sum()
    assert len(counts) == bins
    assert 50 < chi_square < 160  # 99 degrees of freedom: mean 99, standard deviation 14; and it is always the same


def test_a_late_step_is_reached_without_the_steps_before_it():
    assert len(random_offsets(1337, 2**60, 12, 10_000, 256)) == 12  # a loop over the steps would never return


@pytest.mark.parametrize("kind", ["random", "epoch"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_windows_of_a_step_are_the_same_for_any_number_of_processes(processes, kind):
    count, batch_size, block_size = 24, 3, 16
    ids = np.arange(5000, dtype=np.uint16)
    stream = TokenStream(cut(ids, [1234, 3766]), 5000)
    for step in (0, 1, 13, 999):
        drawn = training_windows(stream, order=kind, seed=7, step=step, count=count, block_size=block_size)
        alone = stream.windows(*both(drawn), block_size)
        taken = [
            [stream.windows(*both(mine), block_size) for mine in drawn.shares(batch_size, processes, rank)]
            for rank in range(processes)
        ]
        # Side by side, the micro-batches of all processes are those of one process, in its order.
        np.testing.assert_array_equal(alone, np.stack(taken, axis=1).reshape(-1, block_size + 1))


# ---------------------------------------------------------------------------------------------------------------------
# training_windows: epoch


def targets_of(offsets, targets, length):
    """The positions that windows predict."""
    return np.concatenate([(offset + 1 + np.arange(n)) % length for offset, n in zip(offsets, targets, strict=True)])


def whole_epoch(seed, epoch, length, block_size):
    count = -(-length // block_size)
    return both(epoch_windows(seed, epoch, np.arange(count), length, block_size))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.integers(2, 400), st.integers(1, 60), st.integers(0, 9), st.integers(0, 5))
def test_in_an_epoch_every_token_is_a_target_once(length, block_size, seed, epoch):
    block_size = min(block_size, length - 1)
    offsets, targets = whole_epoch(seed, epoch, length, block_size)
    assert sorted(targets_of(offsets, targets, length)) == list(range(length))
    assert (targets < block_size).sum() <= 1 and targets.min() >= 1


@pytest.mark.parametrize("length, block_size", [(2, 1), (8, 4), (9, 4), (11, 4), (12, 4), (1025, 1024), (2048, 1024)])
def test_an_epoch_of_the_stream_predicts_each_id_from_the_one_before_it(length, block_size):
    stream = TokenStream([np.arange(length, dtype=np.uint16)], length)
    windows = stream.windows(*whole_epoch(3, 1, length, block_size), block_size)
    real = windows[:, 1:] != NO_TARGET
    np.testing.assert_array_equal((windows[:, :-1][real] + 1) % length, windows[:, 1:][real])
    assert sorted(windows[:, 1:][real]) == list(range(length))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(2, 200), st.integers(1, 30), st.integers(1, 50), st.integers(0, 7))
def test_steps_cut_the_run_of_all_epochs_wherever_they_fall(length, block_size, count, seed):
    block_size = min(block_size, length - 1)
    epochs = [whole_epoch(seed, epoch, length, block_size) for epoch in range(3)]
    offsets, targets = (np.concatenate(parts) for parts in zip(*epochs, strict=True))
    for step in range(len(offsets) // count):
        drawn = draw("epoch", seed, step, count, length, block_size)
        np.testing.assert_array_equal(drawn[0], offsets[step * count : (step + 1) * count])
        np.testing.assert_array_equal(drawn[1], targets[step * count : (step + 1) * count])


def test_a_step_may_hold_several_epochs():
    offsets, targets = draw("epoch", 0, 1, 100, 10, 4)  # 3 windows an epoch
    counts = np.bincount(targets_of(offsets, targets, 10), minlength=10)
    assert counts.min() >= 32 and counts.max() <= 35


def test_epoch_windows_are_these():
    # Literals, for the same reason as those of random ones.
    offsets, targets = draw("epoch", 1337, 0, 8, 1_003_854, 256)
    assert offsets.tolist() == [150777, 867143, 262905, 838215, 470087, 455239, 287225, 898375]
    assert targets.tolist() == [256] * 8
    late, _ = draw("epoch", 0, 10**6, 4, 2**33, 1024)
    assert late.tolist() == [8131502967, 3405775735, 6449592183, 6105521015]


def test_a_late_epoch_is_reached_at_once():
    offsets, targets = draw("epoch", 5, 2**50, 12, 10**13, 1024)  # nothing the size of the stream is made
    assert len(offsets) == len(targets) == 12 and (offsets >= 0).all() and (offsets < 10**13).all()


def test_epochs_and_seeds_differ_in_order_and_in_phase():
    epochs = [whole_epoch(seed, epoch, 1001, 8)[0] for seed in range(3) for epoch in range(5)]
    assert len({tuple(offsets) for offsets in epochs}) == 15
    assert len({tuple(sorted(offsets)) for offsets in epochs}) > 13  # 1001 phases


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 9))
def test_the_permutation_is_one(count, key):
    keys = [np.uint64(key + i) for i in range(8)]
    assert sorted(permute(np.arange(count), count, keys)) == list(range(count))


def test_the_permutation_shuffles():
    count, draws = 100, 4000
    starts = np.array([epoch_windows(0, epoch, np.arange(3), count * 8, 8).offsets for epoch in range(draws)])
    phases = np.array([int(np.random.Philox(key=0, counter=[0, e, 1, 0]).random_raw()) % 800 for e in range(draws)])
    places = (starts - phases[:, None]) % 800 // 8  # which window came first, second, third
    for column in places.T:
        chi_square = ((np.bincount(column, minlength=count) - draws / count) ** 2 / (draws / count)).sum()
        assert 50 < chi_square < 160  # 99 degrees of freedom, as above
    gaps = np.bincount((places[:, 1] - places[:, 0]) % count, minlength=count)
    assert gaps[0] == 0 and gaps[1:].max() < 2 * draws / count  # no place follows another more often than by chance
    phase_bins = np.bincount(phases // 8, minlength=count)
    assert 50 < ((phase_bins - draws / count) ** 2 / (draws / count)).sum() < 160


# ---------------------------------------------------------------------------------------------------------------------
# training_windows: documents

END_ID = 99


def document_stream(lengths, sizes=None):
    """A stream of documents of these lengths, each with its end-of-text token, in chunks of these sizes."""
    ids = np.concatenate([[*range(length - 1), END_ID] for length in lengths]).astype(np.uint16)
    return TokenStream(cut(ids, sizes) if sizes else [ids], len(ids), END_ID)


def slow_document_windows(lengths, block_size):
    """From a token on to the last end of a document within block_size; if there is none, block_size tokens."""
    ends, start, windows = np.cumsum(lengths).tolist(), 0, []
    while start < ends[-1]:
        within = [end for end in ends if start < end <= start + block_size]
        windows.append((start, (within[-1] if within else start + block_size) - start))
        start += windows[-1][1]
    return windows


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 20))
def test_document_windows_end_with_documents(lengths, block_size):
    stream = document_stream(lengths)
    offsets, counts = both(stream.document_windows(block_size))
    assert list(zip(offsets.tolist(), counts.tolist(), strict=True)) == slow_document_windows(lengths, block_size)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.integers(1, 30), min_size=3, max_size=30), st.integers(1, 20), st.integers(0, 9))
def test_in_an_epoch_of_documents_every_token_is_a_target_once(lengths, block_size, seed):
    stream = document_stream(lengths)
    starts = {0, *np.cumsum(lengths)[:-1].tolist()}
    count = len(stream.document_windows(block_size))
    flags = {"order": "documents", "seed": seed, "block_size": block_size}
    for step in (0, 3):  # an epoch is a step here
        offsets, counts = both(training_windows(stream, step=step, count=count, **flags))
        assert sorted(targets_of(offsets, counts, len(stream))) == list(range(len(stream)))
        for offset in set(offsets.tolist()) - starts:  # it goes on with a document that is longer than a window
            assert offset - block_size in offsets
    half = both(training_windows(stream, step=7, count=count, **flags))
    parts = [both(training_windows(stream, step=7 * count + i, count=1, **flags)) for i in range(count)]
    np.testing.assert_array_equal(half, np.concatenate(parts, axis=1))


def test_documents_are_found_across_chunks_and_without_an_end_of_text():
    lengths = [5, 1, 9, 3, 12]
    whole, parts = document_stream(lengths), document_stream(lengths, [4, 1, 7, 11, 7])
    np.testing.assert_array_equal(both(whole.document_windows(8)), both(parts.document_windows(8)))
    text = TokenStream([np.arange(30, dtype=np.uint16)], 30)  # one document, which nothing ends
    assert both(text.document_windows(8))[0].tolist() == [0, 8, 16, 24]
    assert both(text.document_windows(8))[1].tolist() == [8, 8, 8, 6]


def test_a_late_epoch_of_documents_is_reached_at_once():
    stream = document_stream([7] * 1000)
    drawn = training_windows(stream, order="documents", seed=5, step=2**50, count=12, block_size=16)
    assert (both(drawn)[0] % 7 == 0).all() and both(drawn)[1].tolist() == [14] * 12


# ---------------------------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("count, multiple, padded", [(0, 3, 0), (5, 1, 5), (5, 3, 6), (6, 3, 6), (7, 4, 8)])
def test_padding_adds_windows_without_a_target(count, multiple, padded):
    windows = Windows(np.arange(count) * 10, np.full(count, 7))
    offsets, lengths = both(windows.padded(multiple))
    assert len(offsets) == padded
    assert offsets[:count].tolist() == windows.offsets.tolist() and lengths[:count].tolist() == [7] * count
    assert not lengths[count:].any()
    stream = TokenStream([np.arange(99, dtype=np.uint16)], 99)
    assert (stream.windows(offsets, lengths, 7)[count:, 1:] == NO_TARGET).all()


def test_the_processes_take_a_micro_batch_each_in_turn():
    windows = Windows(np.arange(12), np.arange(12) + 100)
    shares = [[mine.offsets.tolist() for mine in windows.shares(2, 3, rank)] for rank in range(3)]
    assert shares == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    assert [mine.lengths.tolist() for mine in windows.shares(2, 3, 2)] == [[104, 105], [110, 111]]
    with pytest.raises(ValueError):
        list(windows.shares(5, 1, 0))  # 12 windows are no whole number of micro-batches


# ---------------------------------------------------------------------------------------------------------------------
# evaluation_windows


def evaluated(length, block_size, tokens):
    return both(evaluation_windows(length, block_size=block_size, tokens=tokens))


@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
def test_every_token_but_the_first_is_a_target_once(block_size):
    for length in range(2, 4 * block_size + 3):
        stream = TokenStream([np.arange(length + 3, dtype=np.uint16)], length)  # the ids are the positions
        offsets, targets = evaluated(length, block_size, 0)
        windows = stream.windows(offsets, targets, block_size)
        real = windows[:, 1:] != NO_TARGET
        assert windows[:, 1:][real].tolist() == list(range(1, length))
        np.testing.assert_array_equal(windows[:, :-1][real], windows[:, 1:][real] - 1)
        np.testing.assert_array_equal(real.sum(axis=1), targets)
        assert targets.min() >= 1 and targets.sum() == length - 1  # no window without a target


def test_a_stream_of_one_token_has_no_evaluation_windows():
    for most_tokens in (0, 100):
        offsets, targets = evaluated(1, 8, most_tokens)
        assert len(offsets) == len(targets) == 0


@pytest.mark.parametrize("most_tokens", [1, 7, 8, 9, 64, 100, 500, 991])
def test_limited_evaluation_takes_evenly_spaced_windows_once(most_tokens):
    length, block_size = 1000, 8
    every, _ = evaluated(length, block_size, 0)
    offsets, _ = evaluated(length, block_size, most_tokens)
    assert most_tokens <= len(offsets) * block_size < most_tokens + block_size
    assert set(offsets.tolist()) <= set(every.tolist())
    steps = np.diff(np.append(offsets, len(every) * block_size)) // block_size  # the last gap reaches the end
    assert offsets[0] == 0
    assert steps.min() >= 1  # no window twice
    assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize("most_tokens", [993, 999, 1000, 10**9])
def test_a_limit_beyond_the_stream_limits_nothing(most_tokens):
    limited, every = evaluated(1000, 8, most_tokens), evaluated(1000, 8, 0)
    np.testing.assert_array_equal(limited, every)
