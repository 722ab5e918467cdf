"""GRPO on the prompts of a file."""

import json

import pytest
import tiny

from blip3o_jax.errors import InputError
from blip3o_jax.jobs import grpo
from blip3o_jax.jobs.prompts import read_prompts
from blip3o_jax.train.config import DataConfig, GrpoConfig

DOG = [{"class": "dog", "count": 1}]
ROWS = [{"prompt": f"a dog and {n} cats", "tag": "counting", "include": DOG} for n in range(25)]


def drawn(folder, rows=ROWS, rewards=("scenes",), seed=0, **data):
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = DataConfig(prompts=str(folder / "prompts.jsonl"), seed=seed, **data)
    section = GrpoConfig(num_generations=4)
    cfg = tiny.config(stage="grpo", joint=None, grpo=section, data=data, batch_size=8)
    return grpo.of_file(cfg, tiny.text(), rewards)


def test_an_epoch_has_every_prompt_once_with_its_metadata_but_those_that_are_held_out(tmp_path):
    prompts_at, heldout = drawn(tmp_path)
    assert len(heldout) == 2
    steps = [prompts_at(step) for step in range(23)]
    assert all(len(step) == 2 for step in steps)
    epochs = [row for step in steps for row in step]
    for epoch in (epochs[:23], epochs[23:]):
        found = sorted([*epoch, *heldout], key=lambda row: row["prompt"])
        assert found == sorted(ROWS, key=lambda row: row["prompt"])
    assert epochs[:23] != epochs[23:]
    # A function of the seed and the step alone.
    assert drawn(tmp_path)[0](7) == prompts_at(7)
    assert drawn(tmp_path, seed=1)[0](7) != prompts_at(7)


@pytest.mark.parametrize(
    ("row", "rewards", "sentence"),
    [
        ({"prompt": "a dog " * 300}, ("http://127.0.0.1:1/",), r"prompts.jsonl line 26: .*tokens"),
        ({"prompt": "a dog"}, ("scenes",), r"prompts.jsonl line 26: .*no metadata of GenEval"),
        ({"prompt": "a dog"}, ("ocr",), r"prompts.jsonl line 26: .*nothing there"),
        ({"text": "a dog"}, ("scenes",), r"prompts.jsonl line 26 has no field `prompt`"),
        ({"prompt": "a", "source": "coco"}, ("http://127.0.0.1:1/",), "26: `source` is what edits"),
        ({**ROWS[0], "include": []}, ("scenes",), r"`include` is a list of .*, not \[\]"),
        ({**ROWS[0], "include": [{"class": "cat"}]}, ("scenes",), "26: .*`include` is a list of"),
        ({**ROWS[0], "include": "a cat"}, ("scenes",), "26: .*`include` is a list of"),
        ({**ROWS[0], "include": [{**DOG[0], "count": "1"}]}, ("scenes",), "`include` is a list"),
        ({**ROWS[0], "include": [{**DOG[0], "position": ["above", 0]}]}, ("scenes",), "a list of"),
        ({**ROWS[0], "tag": "text"}, ("scenes",), "26: .*tag 'text' has a `word`"),
    ],
)
def test_a_prompt_that_cannot_be_drawn_or_judged_is_named_by_its_line(
    tmp_path, row, rewards, sentence
):
    quoted = [{**own, "prompt": f'"{own["prompt"]}"'} for own in ROWS]
    with pytest.raises(InputError, match=sentence):
        drawn(tmp_path, [*quoted, row], rewards)


def test_a_prompt_that_no_training_row_holds_is_named(tmp_path):
    long = {**ROWS[0], "prompt": "a dog " * 8}
    assert drawn(tmp_path, [*ROWS, long])
    with pytest.raises(InputError, match=r"line 26: A training row of .* does not fit a row of 50"):
        drawn(tmp_path, [*ROWS, long], row_length=50)


def test_what_genevals_files_hold_as_text_is_read(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,tag,include\na dog,single_object,"[{""class"": 1}]"\n')
    (row,) = read_prompts(str(tmp_path / "a.csv"))
    assert row.fields["include"] == [{"class": 1}]


def test_parquet_has_the_metadata_that_json_has(tmp_path):
    pa = pytest.importorskip("pyarrow")
    table = pa.table(
        [[x] for x in ("a dog", "colors", DOG, b"png")], ["prompt", "tag", "include", "png"]
    )
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    (row,) = read_prompts(str(tmp_path / "a.parquet"))
    assert row.fields == {"prompt": "a dog", "tag": "colors", "include": DOG}
    # A field's name is no type.
    table = pa.table([["a dog"], [{"candidate": "x"}], [[b"png"]]], ["prompt", "update", "raw"])
    pa.parquet.write_table(table, tmp_path / "b.parquet")
    (row,) = read_prompts(str(tmp_path / "b.parquet"))
    assert row.fields == {"prompt": "a dog", "update": {"candidate": "x"}}


def test_one_prompt_is_too_few(tmp_path):
    with pytest.raises(InputError, match="has 1 prompts; one is held out"):
        drawn(tmp_path, ROWS[:1])


@pytest.mark.parametrize("name", ["edits", "text_fraction", "extra"])
def test_shares_of_the_embedded_world_have_no_effect_beside_a_file(name):
    data = DataConfig(prompts="prompts.txt", **{name: 0.5})
    with pytest.raises(InputError, match=f"data.{name} has no effect beside data.prompts"):
        tiny.config(stage="grpo", joint=None, grpo=GrpoConfig(num_generations=4), data=data)
