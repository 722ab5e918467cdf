import pytest

from blip3o_jax.errors import InputError
from blip3o_jax.jobs.output import new_file, new_folder


def test_a_folder_appears_whole(tmp_path):
    with new_folder(str(tmp_path / "a" / "made"), "list") as folder:
        (folder / "list").write_text("x")
        assert not (tmp_path / "a" / "made").exists()
    assert (tmp_path / "a" / "made" / "list").read_text() == "x"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["made"]


def test_a_folder_is_replaced_only_when_asked_and_known(tmp_path):
    target = tmp_path / "made"
    with new_folder(str(target), "list") as folder:
        (folder / "list").write_text("old")
    with pytest.raises(InputError, match="--overwrite"), new_folder(str(target), "list"):
        pass
    with new_folder(str(target), "list", overwrite=True) as folder:
        (folder / "list").write_text("new")
    assert (target / "list").read_text() == "new"
    (target / "list").rename(target / "other")
    with (
        pytest.raises(InputError, match="not overwritten"),
        new_folder(str(target), "list", overwrite=True),
    ):
        pass


def test_a_failure_keeps_what_was_there_and_leaves_nothing(tmp_path):
    target = tmp_path / "made"
    with new_folder(str(target), "list") as folder:
        (folder / "list").write_text("old")
    with pytest.raises(RuntimeError), new_folder(str(target), "list", overwrite=True) as folder:
        (folder / "list").write_text("half")
        raise RuntimeError
    assert (target / "list").read_text() == "old"
    with pytest.raises(RuntimeError), new_file(str(tmp_path / "one.png")) as path:
        path.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "one.png"
    with new_file(str(target)) as path:
        path.write_text("x")
    assert target.read_text() == "x"
    with pytest.raises(InputError, match="exists"), new_file(str(target)):
        pass
    with new_file(str(target), overwrite=True) as path:
        path.write_text("y")
    assert target.read_text() == "y"
    assert [p.name for p in tmp_path.iterdir()] == ["one.png"]
