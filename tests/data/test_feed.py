import numpy as np
import pytest

from blip3o_jax.data import feed
from blip3o_jax.errors import InputError
from blip3o_jax.scenes import prompts, scene
from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.train.config import DataConfig, TrainConfig

CFG = TrainConfig(stage="joint", batch_size=4, data=DataConfig(num_train=16, row_length=112))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("scenes"))


def opened(data_dir, **changes):
    """Images and patches of the 16 scenes, four a batch."""
    return feed.Feed(
        CFG.data, CFG.blip3o(), "images", **{"batch_size": 4, "data_dir": data_dir, **changes}
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("write() failed: No space left on device; at byte 8"),
    ],
)
def test_a_full_disk_is_one_sentence_and_a_defect_none(error, monkeypatch, data_dir):
    def fail(*_):
        raise error

    monkeypatch.setattr(feed.builder, "open_source", fail)
    with pytest.raises(
        InputError, match=f"cannot be drawn into {data_dir}: No space left on device; name another"
    ):
        opened(data_dir)._world("train")
    error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        opened(data_dir)._world("train")


def test_records_are_the_scenes_of_seed_and_index(data_dir):
    records = opened(data_dir)._world("train")
    for i in (0, 7, 15):
        _, drawn = prompts.sample(WorldConfig(), i)
        np.testing.assert_array_equal(records[i]["images"], scene.compose(drawn))
        np.testing.assert_array_equal(records[i]["patches"], scene.patch_words(drawn))


def test_rows_hold_the_prompt_and_room_for_the_image(data_dir, tokenizer):
    captions = feed.Feed(
        CFG.data, CFG.blip3o(), "captions", tokenizer, batch_size=4, data_dir=data_dir
    )
    record = {name: array[3] for name, array in captions.heldout(4).items()}
    metadata, _ = prompts.sample(WorldConfig(), 3, "heldout")
    expected = tokenizer.encode_prompt(metadata["prompt"])
    np.testing.assert_array_equal(record["tokens"][: len(expected)], expected)
    assert record["start"] == len(expected) - 1
    assert record["tokens"].shape == (112,)
    after = record["tokens"][len(expected) + 64 :]
    assert after[0] == tokenizer.vocab.image_end_tag_id
    assert after[1] == tokenizer.vocab.eos_token_id
    assert (after[3:] == tokenizer.vocab.pad_token_id).all()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_exercises_show_words_as_often_as_asked(share, tokenizer):
    data = DataConfig(exercises={"sketch": 1.0}, row_length=112, text_fraction=share)
    rows = next(feed.Feed(data, CFG.blip3o(), "exercises", tokenizer, batch_size=64).train())
    texts = [tokenizer.tokenizer.decode(row.tolist()) for row in rows["tokens"]]
    assert abs(sum('the word "' in text for text in texts) / 64 - share) < 0.2 * bool(share) + 0.01


def test_a_batch_is_a_function_of_seed_and_step(data_dir):
    whole = take(opened(data_dir).train(), 9)
    resumed = take(opened(data_dir).train(5), 4)
    assert all(same(a, b) for a, b in zip(whole[5:], resumed, strict=True))
    other = next(opened(data_dir, seed=1).train())
    assert not same(whole[0], other)


def test_an_epoch_shows_every_record_once_and_the_next_in_another_order(data_dir):
    batches = take(opened(data_dir).train(), 8)
    images = np.concatenate([b["images"] for b in batches])
    first, second = images[:16], images[16:]
    assert {i.tobytes() for i in first} == {i.tobytes() for i in second}
    assert len({i.tobytes() for i in first}) == 16
    assert not np.array_equal(first, second)


def test_hosts_share_the_batch_of_one(data_dir):
    whole = take(opened(data_dir).train(), 3)
    part = take(opened(data_dir, own=[1, 3]).train(), 3)
    for batch, own in zip(whole, part, strict=True):
        np.testing.assert_array_equal(own["images"], batch["images"][[1, 3]])


def test_what_cannot_be_written_is_named(data_dir):
    with pytest.raises(InputError, match="cannot be drawn into /proc/scenes"):
        opened("/proc/scenes").train()
