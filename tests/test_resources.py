"""Configs are found by path and by shipped name."""

import pytest

from blip3o_jax import resources
from blip3o_jax.errors import InputError


@pytest.fixture
def configs(tmp_path, monkeypatch):
    (tmp_path / "shipped").mkdir()
    for name in ("emoji_joint", "emoji_grpo", "__init__"):
        (tmp_path / "shipped" / f"{name}.py").touch()
    monkeypatch.setattr(resources, "CONFIGS", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["emoji_joint", "emoji_joint.py", "configs/emoji_joint.py", "configs/emoji_joint"]
)
def test_a_shipped_name(configs, name):
    assert resources.find_config(name) == configs / "shipped" / "emoji_joint.py"


def test_a_file_goes_before_a_shipped_name(configs):
    (configs / "configs").mkdir()
    own = configs / "configs" / "emoji_joint.py"
    own.touch()
    assert resources.find_config("configs/emoji_joint.py").resolve() == own
    assert resources.find_config(str(own)) == own


@pytest.mark.parametrize(
    "name",
    ["emoji_join", "elsewhere/emoji_joint.py", "configs/emoji_joint.yaml", "../emoji_joint.py"],
)
def test_a_wrong_name_is_told_the_nearest(configs, name):
    with pytest.raises(InputError, match=r"did you mean 'emoji_joint'\?"):
        resources.find_config(name)


def test_init_is_no_config(configs):
    with pytest.raises(InputError):
        resources.find_config("__init__")


def test_the_link_leads_to_the_clones_configs():
    assert resources.CONFIGS.resolve() == resources.CONFIGS.parent.parent / "configs"
