"""Windows: a TokenStream against plain slices, and which windows training and evaluation take."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pytest

from tokenization import windows as windows_module
from tokenization.windows import NO_TARGET, TokenStream, evaluation_offsets, open_stream, training_offsets

ROW = 1024


def cut(ids, sizes):
    """The ids as consecutive chunks of these sizes."""
    assert sum(sizes) == len(ids)
    return np.split(ids, np.cumsum(sizes)[:-1])


def sliced_windows(ids, offsets, width):
    """What TokenStream.windows should return, by plain slices of one array."""
    longer = np.concatenate([ids.astype(np.int64), np.full(max(offsets) + width, NO_TARGET)])
    return np.stack([longer[offset : offset + width] for offset in offsets])


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
def test_windows_are_slices_at_every_offset_and_width(dtype, sizes, length):
    # ids from the top of the range: a detour through a smaller type would change them; 999 marks the padding
    ids = np.arange(np.iinfo(dtype).max - 39, np.iinfo(dtype).max + 1, dtype=np.int64).astype(dtype)
    ids[length:] = 999
    stream = TokenStream(cut(ids, sizes), length)
    assert len(stream) == length
    offsets = np.arange(length + 9)
    for width in (1, 2, 3, 8, 23, 40, 47):
        windows = stream.windows(offsets, width)
        assert windows.dtype == np.int64
        np.testing.assert_array_equal(windows, sliced_windows(ids[:length], offsets, width))


def test_windows_come_in_the_order_of_the_offsets():
    stream = TokenStream(cut(np.arange(30, dtype=np.uint16), [11, 19]), 30)
    offsets = np.array([25, 3, 3, 10, 0, 30, 9])
    np.testing.assert_array_equal(stream.windows(offsets, 4), sliced_windows(np.arange(30), offsets, 4))


def test_no_offsets_give_no_windows():
    assert TokenStream([np.arange(30, dtype=np.uint16)], 30).windows(np.empty(0, dtype=np.int64), 4).shape == (0, 4)


def test_a_window_may_be_written_without_changing_the_stream():
    ids = np.arange(30, dtype=np.uint16)
    stream = TokenStream(cut(ids, [12, 18]), 30)
    stream.windows(np.array([8]), 10)[:] = 0
    np.testing.assert_array_equal(ids, np.arange(30))


def test_beyond_the_end_there_is_no_target():
    stream = TokenStream([np.arange(8, dtype=np.uint16)], 6)  # 6 and 7 are padding
    expected = [[4, 5, -100], [5, -100, -100], [-100, -100, -100], [-100, -100, -100]]
    assert stream.windows(np.array([4, 5, 6, 100]), 3).tolist() == expected


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

    np.testing.assert_array_equal(stream.windows(np.array([0]), count + 1)[0], np.append(ids.astype(np.int64), -100))
    borders = np.cumsum([len(chunk) for chunk in stream._chunks])
    offsets = np.concatenate([borders + shift for shift in (-300, -256, -255, -1, 0, 1)])
    np.testing.assert_array_equal(stream.windows(offsets, 257), sliced_windows(ids, offsets, 257))


def test_each_split_is_a_stream_of_its_own(tmp_path):
    write_data_dir(tmp_path, np.arange(3000, dtype=np.uint16), padding=7)
    other = datasets.Dataset.from_dict(
        {"input_ids": [[5] * ROW]},
        datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"), length=ROW)}),
    )
    other.save_to_disk(tmp_path / "val")
    (tmp_path / "prepared.json").write_text(json.dumps({"tokens": {"train": 3000, "val": 10}}))
    train, val = (open_stream(str(tmp_path), split) for split in ("train", "val"))
    assert train.windows(np.array([2998]), 4).tolist() == [[2998, 2999, -100, -100]]
    assert val.windows(np.array([0]), 12).tolist() == [[5] * 10 + [-100] * 2]


# ---------------------------------------------------------------------------------------------------------------------
# training_offsets


def test_training_offsets_are_these():
    # Literals: runs that were begun can be resumed, and compared, only while the generator stays what it is.
    first, second = (training_offsets(1337, step, 8, 1_003_854, 256).tolist() for step in (0, 1))
    assert first == [720011, 940031, 187240, 776619, 585524, 608629, 586757, 761730]
    assert second == [141151, 532973, 374575, 53888, 893947, 889790, 938855, 64622]
    late = training_offsets(0, 10**6, 4, 2**33, 1024).tolist()  # offsets that 32 bits do not hold
    assert late == [594181638, 5455991558, 5637093830, 327663482]


def test_training_offsets_are_a_pure_function_of_seed_and_step():
    first = training_offsets(3, 14, 64, 10_000, 32)
    training_offsets(3, 15, 64, 10_000, 32)
    np.random.seed(0)
    again = training_offsets(3, 14, 64, 10_000, 32)
    assert first.dtype == np.int64 and first.shape == (64,)
    np.testing.assert_array_equal(first, again)


def test_more_windows_begin_with_those_of_fewer():
    few, many = (training_offsets(3, 14, count, 10_000, 32) for count in (8, 64))
    np.testing.assert_array_equal(few, many[:8])


def test_no_two_seeds_or_steps_share_a_draw():
    # A stream this long makes a chance collision among 25,600 draws less likely than 2**-30, while steps (or seeds)
    # that shift one sequence of draws instead of having their own would repeat nearly all of them.
    draws = [training_offsets(seed, step, 64, 2**62, 1) for seed in range(10) for step in (*range(38), 10**6, 10**9)]
    assert len(np.unique(draws)) == 10 * 40 * 64


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("places", [1, 2, 3, 7])
def test_training_windows_start_everywhere_and_end_within_the_stream(places, block_size):
    length = block_size + places  # a window takes block_size + 1 tokens: the last one starts at places - 1
    offsets = np.concatenate([training_offsets(0, step, 50, length, block_size) for step in range(20)])
    assert set(offsets.tolist()) == set(range(places))
    stream = TokenStream([np.arange(length, dtype=np.uint16)], length)
    assert (stream.windows(offsets, block_size + 1) != NO_TARGET).all()


def test_training_offsets_are_uniform():
    bins, draws = 100, 100_000
    offsets = np.concatenate([training_offsets(5, step, 100, 50_000 + 256, 256) for step in range(draws // 100)])
    counts = np.bincount(offsets * bins // 50_000, minlength=bins)
    chi_square = ((counts - draws / bins) ** 2 / (draws / bins)).sum()
    assert len(counts) == bins
    assert 50 < chi_square < 160  # 99 degrees of freedom: mean 99, standard deviation 14; and it is always the same


def test_a_late_step_is_reached_without_the_steps_before_it():
    assert len(training_offsets(1337, 2**60, 12, 10_000, 256)) == 12  # a loop over the steps would never return


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_windows_of_a_step_are_the_same_for_any_number_of_processes(processes):
    count, batch_size, block_size = 24, 3, 16
    ids = np.arange(5000, dtype=np.uint16)
    stream = TokenStream(cut(ids, [1234, 3766]), 5000)
    for step in (0, 1, 999):
        offsets = training_offsets(7, step, count, len(stream), block_size)
        alone = [stream.windows(mine, block_size + 1) for mine in offsets.reshape(-1, batch_size)]
        shared = offsets.reshape(-1, processes, batch_size)  # (micro-batches of a process, processes, windows)
        taken = [[stream.windows(mine, block_size + 1) for mine in shared[:, index]] for index in range(processes)]
        # Side by side, the micro-batches of all processes are those of one process, in its order.
        np.testing.assert_array_equal(np.concatenate(alone), np.stack(taken, axis=1).reshape(-1, block_size + 1))


# ---------------------------------------------------------------------------------------------------------------------
# evaluation_offsets


@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
def test_every_token_but_the_first_is_a_target_once(block_size):
    for length in range(2, 4 * block_size + 3):
        stream = TokenStream([np.arange(length + 3, dtype=np.uint16)], length)  # the ids are the positions
        windows = stream.windows(evaluation_offsets(length, block_size, 0), block_size + 1)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        real = targets != NO_TARGET
        assert targets[real].tolist() == list(range(1, length))
        np.testing.assert_array_equal(inputs[real], targets[real] - 1)
        assert real.any(axis=1).all()  # no window without a target


def test_a_stream_of_one_token_has_no_evaluation_windows():
    assert len(evaluation_offsets(1, 8, 0)) == len(evaluation_offsets(1, 8, 100)) == 0


@pytest.mark.parametrize("most_tokens", [1, 7, 8, 9, 64, 100, 500, 991])
def test_limited_evaluation_takes_evenly_spaced_windows_once(most_tokens):
    length, block_size = 1000, 8
    every = evaluation_offsets(length, block_size, 0)
    offsets = evaluation_offsets(length, block_size, most_tokens)
    assert most_tokens <= len(offsets) * block_size < most_tokens + block_size
    assert set(offsets.tolist()) <= set(every.tolist())
    steps = np.diff(np.append(offsets, len(every) * block_size)) // block_size  # the last gap reaches the end
    assert offsets[0] == 0
    assert steps.min() >= 1  # no window twice
    assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize("most_tokens", [993, 999, 1000, 10**9])
def test_a_limit_beyond_the_stream_limits_nothing(most_tokens):
    np.testing.assert_array_equal(evaluation_offsets(1000, 8, most_tokens), evaluation_offsets(1000, 8, 0))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
@pytest.mark.parametrize("most_tokens", [0, 100])
def test_evaluation_has_the_same_targets_for_any_batch_size(batch_size, most_tokens):
    length, block_size = 500, 7
    stream = TokenStream(cut(np.arange(512, dtype=np.uint16), [200, 312]), length)
    offsets = evaluation_offsets(length, block_size, most_tokens)
    expected = stream.windows(offsets, block_size + 1)[:, 1:]
    # Batches are filled up with windows that start at the end of the stream: they have no target.
    filled = np.append(offsets, np.full(-len(offsets) % batch_size, length))
    batches = [stream.windows(mine, block_size + 1)[:, 1:] for mine in filled.reshape(-1, batch_size)]
    targets = np.concatenate(batches)
    np.testing.assert_array_equal(targets[targets != NO_TARGET], expected[expected != NO_TARGET])
