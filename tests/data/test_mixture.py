import dataclasses
import json

import numpy as np
import pytest
from tiny import TEXT_ONLY

from blip3o_jax.config import replace
from blip3o_jax.data import feed
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.mixture import HeldOut, place, shuffled, shuffled_blocks, whole_weights
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.train import open_feed
from blip3o_jax.presets import preset
from blip3o_jax.train.config import DataConfig, TrainConfig


def test_weights_become_whole_numbers_exactly():
    assert whole_weights([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert whole_weights([4, 6]) == (2, 3)
    assert whole_weights([0.333, 1]) == (333, 1000)


@pytest.mark.parametrize("weights", [(1,), (7, 2, 1), (333, 1000), (1, 1, 1, 5)])
def test_each_period_holds_the_weights_exactly_and_evenly(weights):
    total = sum(weights)
    placed = [place(i, weights) for i in range(3 * total)]
    for source, weight in enumerate(weights):
        at = [i for i, (s, _) in enumerate(placed) if s == source]
        assert [k for _, k in (placed[i] for i in at)] == list(range(3 * weight))
        for end in range(0, 3 * total, 7):  # never far from its share
            assert abs(sum(i < end for i in at) - end * weight / total) < len(weights)


def test_a_shuffle_shows_every_record_once_an_epoch_in_new_orders():
    order = shuffled(50, 3)
    epochs = [[order(e * 50 + i) for i in range(50)] for e in range(2)]
    assert [sorted(e) for e in epochs] == [list(range(50))] * 2
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("starts", [[0, 10, 12, 30, 31, 40, 47], [0]])
def test_a_shuffle_of_blocks_shows_every_record_once_and_stays_near(starts):
    order = shuffled_blocks(np.array(starts), 50, seed=1)
    epochs = [[order(e * 50 + i) for i in range(50)] for e in range(2)]
    assert [sorted(e) for e in epochs] == [list(range(50))] * 2
    assert epochs[0] != epochs[1]
    blocks = np.searchsorted(starts, epochs[0], "right") - 1
    # A block's records lie among those of its window, so that reading in order needs few blocks at
    # once.
    live = [len({b for b in blocks[i:] if b in set(blocks[: i + 1])}) for i in range(50)]
    assert max(live) <= 4
    assert order(77) == shuffled_blocks(np.array(starts), 50, seed=1)(77)


class Numbers:
    def __init__(self, size, blocks=None):
        self.size, self.blocks = size, blocks

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return i


@pytest.mark.parametrize(("size", "count"), [(10, 5), (11, 3), (64, 1), (100, 7)])
def test_held_out_and_trained_records_part_the_source(size, count):
    kept, trained = (HeldOut(Numbers(size), count, rest) for rest in (False, True))
    held, rest = ([view[i] for i in range(len(view))] for view in (kept, trained))
    assert len(held) == count
    assert sorted(held + rest) == list(range(size))
    assert rest == sorted(rest)
    if count > 1:
        assert max(np.diff(held)) <= size / count


def test_blocks_move_up_when_records_are_held_out():
    starts = np.array([0, 4, 8, 10])
    view = HeldOut(Numbers(13, starts), 4, rest=True)
    for start, block in zip(view.blocks, starts, strict=True):
        assert view[start] == min(i for i in range(block, 13) if i not in (0, 3, 6, 9))


def test_too_many_held_out_are_refused():
    with pytest.raises(
        InputError, match=r"data\.heldout 6 leaves too few of the first source's 10"
    ):
        HeldOut(Numbers(10), 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory, made):
    """A run over a tar of pictures 0..19 and a parquet file of 100..129, three of the first held
    out."""
    folder = tmp_path_factory.mktemp("mixture")
    made.tar(folder / "a.tar", range(20))
    made.parquet(folder / "b.parquet", range(100, 130))
    sources = (
        SourceConfig("webdataset", str(folder / "a.tar"), weight=0.25),
        SourceConfig("parquet", str(folder / "*.parquet"), weight=0.75),
    )
    return TrainConfig(stage="joint", batch_size=8, data=DataConfig(sources=sources, heldout=3))


def numbers(batch):
    return batch["images"][:, 0, 0, 0].tolist()


def take(cfg, tokenizer, count, start=0, own=None):
    iterator = open_feed(cfg, tokenizer, own=own).train(start)
    return [next(iterator) for _ in range(count)]


def test_a_mixture_keeps_its_weights_and_never_shows_what_is_held_out(run, tokenizer):
    shown = [numbers(batch) for batch in take(run, tokenizer, 34)]
    assert all(sum(n < 100 for n in batch) == 2 for batch in shown)
    held = numbers(open_feed(run, tokenizer).heldout(64))
    assert held == [0, 6, 12]
    first = [n for batch in shown for n in batch if n < 100]
    assert sorted(first[:17]) == sorted(first[17:34]) == sorted(set(range(20)) - set(held))
    assert len({n for batch in shown[:5] for n in batch if n >= 100}) == 30


def test_rows_hold_the_caption_of_their_picture(run, tokenizer):
    batch = take(run, tokenizer, 1)[0]
    for row, start, n in zip(batch["tokens"], batch["start"], numbers(batch), strict=True):
        expected = tokenizer.encode_prompt(f"a red heart {n}")
        assert row[: start + 1].tolist() == expected
    assert batch["images"].shape == (8, 64, 64, 3)
    assert batch["images"].dtype == np.uint8


def test_the_global_batch_is_the_same_whatever_rows_a_host_has(run, tokenizer):
    whole = take(run, tokenizer, 6)
    for own in ([4, 5, 6, 7], [0, 1, 4, 5], [3]):
        for part, batch in zip(take(run, tokenizer, 6, own=own), whole, strict=True):
            for name, array in batch.items():
                np.testing.assert_array_equal(part[name], array[own])


def test_what_is_measured_is_spread_over_what_is_held_out(run, tokenizer):
    more = dataclasses.replace(run, data=dataclasses.replace(run.data, heldout=6))
    assert numbers(open_feed(more, tokenizer).heldout(2)) == [0, 9]  # of 0, 3, ..., 15


def test_a_batch_is_a_function_of_seed_and_step(run, tokenizer):
    whole = take(run, tokenizer, 9)
    assert [numbers(b) for b in take(run, tokenizer, 3, start=6)] == [numbers(b) for b in whole[6:]]
    assert numbers(take(dataclasses.replace(run, seed=1), tokenizer, 1)[0]) != numbers(whole[0])
    threads = dataclasses.replace(run, data=dataclasses.replace(run.data, reader_threads=4))
    assert [numbers(b) for b in take(threads, tokenizer, 9)] == [numbers(b) for b in whole]


def test_without_weights_a_source_counts_by_its_size_and_repeats(run, tokenizer):
    first, second = (dataclasses.replace(s, weight=0.0) for s in run.data.sources)
    data = dataclasses.replace(run.data, sources=(dataclasses.replace(first, repeat=3), second))
    shown = [
        n
        for b in take(dataclasses.replace(run, data=data), tokenizer, 81 // 8 + 1)
        for n in numbers(b)
    ][:81]
    assert sum(n < 100 for n in shown) == 3 * 17
    assert sum(n >= 100 for n in shown) == 30


def test_a_model_without_source_images_takes_no_edits(tmp_path, made):
    made.jsonl(tmp_path / "unused.jsonl", range(3))
    line = {"instruction": "make it blue", "input_images": ["0.png"], "output_image": "2.png"}
    (tmp_path / "edits.jsonl").write_text(json.dumps(line))
    data = DataConfig(sources=(SourceConfig("jsonl", str(tmp_path / "edits.jsonl")),))
    with pytest.raises(InputError, match="edits of 1 source images, and the model takes 0"):
        feed.open_sources(data, replace(preset("emoji_64"), **TEXT_ONLY))
