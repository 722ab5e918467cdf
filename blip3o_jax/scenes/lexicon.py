"""The words of the embedded world's prompts and instructions, and a warning of others: a model that
knows this world alone draws something for those too."""

import logging
import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import cycle

from blip3o_jax.scenes import instructions, prompts
from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.scenes.scene import Scene, Thing
from blip3o_jax.scenes.sprites import COLORS, GROUNDS, OBJECTS, PLURALS

log = logging.getLogger(__name__)

QUOTED = re.compile('"[^"]*"')  # letters to be drawn
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
DRAWN = 32  # prompts, some of which are photos of something
SHOWN = 10  # words of a warning


def words_of(texts: Iterable[str]) -> list[str]:
    """The words of prompts or instructions in order, each once, but for those in quotes."""
    return list(dict.fromkeys(w for text in texts for w in WORD.findall(QUOTED.sub(" ", text))))


def _things() -> str:
    """All objects, in all colours: "a red apple, an orange banana, ... and a blue guitar"."""
    return prompts.describe(list(zip(OBJECTS, cycle(COLORS), strict=False)))


@lru_cache
def of_prompts() -> frozenset[str]:
    """The words of all prompts."""
    texts = [_things(), *PLURALS.values(), *prompts.NUMBERS.values(), *prompts.RELATIONS]
    # What stands around them is seen in prompts.
    texts += [prompts.describe([(OBJECTS[0], None)], ground=ground) for ground in GROUNDS]
    worlds = [WorldConfig(weights={"colors": 1.0}, extra=0.0, text=text) for text in (0.0, 1.0)]
    texts += [prompts.sample(w, i)[0]["prompt"] for w in worlds for i in range(DRAWN)]
    return frozenset(words_of(texts))


@lru_cache
def of_instructions() -> frozenset[str]:
    """The words of all instructions."""
    wordings = [text for kind in instructions.WORDINGS.values() for text in kind]
    texts = [_things(), *GROUNDS, *(re.sub(r"\{\w+\}", " ", text) for text in wordings)]
    texts += [*instructions.STEPS, *instructions.ROWS, *instructions.COLUMNS]
    texts += [*instructions.RELATIONS, *instructions.MANY_TOKENS]
    # What stands around them is seen in instructions: a thing that moves from corner to corner, and
    # one that gets its own colours.
    before, *after = (
        Scene((Thing(OBJECTS[0], color, *cell),), next(iter(GROUNDS)))
        for color, cell in (
            (COLORS[0], (0, 0)),
            (COLORS[0], instructions.CELLS[-1]),
            (None, (0, 0)),
        )
    )
    for kind, scene in zip(("move", "recolor"), after, strict=True):
        texts += instructions.instructions(kind, before, scene)
    return frozenset(words_of(texts))


def warn(model: str, texts: Iterable[str], lexicon: frozenset[str]) -> None:
    """Logs one warning that names the words of `texts` outside the lexicon, if there are any."""
    strange = [word for word in words_of(texts) if word not in lexicon]
    if not strange:
        return
    more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
    names = f"{', '.join(strange[:SHOWN])}{more}"
    place = "Its words, all in lower case, are in docs/emoji.md."
    log.warning("%s does not know %s and draws something else instead. %s", model, names, place)
