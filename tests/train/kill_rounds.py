"""Proof that a run survives kill -9, and other signals: ended again and again at random moments,
many of them while a checkpoint is being written.

    python tests/train/kill_rounds.py [--rounds 50] [--processes 1] [--seed 0] [--signals KILL,TERM]
    python tests/train/kill_rounds.py --rounds 5 --bucket gs
    python tests/train/kill_rounds.py --rounds 20 --stage grpo

Trains the transformer of the tiny model, or reinforces both of its halves, with a checkpoint every
few steps; with --bucket, in a bucket of a server on loopback. Every new start must go on from the
newest whole checkpoint there is, every run that comes to its end must have the bits of one that was
never killed, and every signal but KILL give the exit code that launchers know. One JSON line last;
exit code 1 if not.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import socket
import sys
import tempfile
import time

import numpy as np

from blip3o_jax import paths

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for those that follow
from clouds import new_bucket, servers
from forks import fork

# steps of a run, between checkpoints; seconds after which a process hangs
NUM_STEPS, EVERY, LONGEST = 120, 5, 900.0
EXITS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


def train(workdir: paths.AnyPath) -> None:
    """The run, by the loop that `blip3o-jax train` uses, on random rows."""
    from tiny import from_step, practice, rows_at

    from blip3o_jax.parallel.batches import rows_of_host
    from blip3o_jax.parallel.mesh import make_mesh
    from blip3o_jax.train import loop
    from blip3o_jax.train.workdir import own_workdir

    cfg = practice(
        num_steps=NUM_STEPS, log_every=EVERY, eval_every=NUM_STEPS, checkpoint_every=EVERY
    )
    own = rows_of_host(8, make_mesh())

    def mine(step):
        return {name: x[own] for name, x in rows_at(step).items()}

    with own_workdir(cfg, workdir):
        loop.run(cfg, workdir, loop.supervised(cfg, from_step(mine), rows_at(10**6), None))


def reinforce(workdir: paths.AnyPath) -> None:
    """The run of `blip3o-jax grpo`, both halves in turns of three steps: prompts of the embedded
    world, rewarded for bright pictures."""
    import tiny

    from blip3o_jax.convert.random_weights import random_params
    from blip3o_jax.jobs.grpo import of_world
    from blip3o_jax.models.blip3o import PARTS
    from blip3o_jax.rl.run import reinforced
    from blip3o_jax.train import loop
    from blip3o_jax.train.config import GrpoConfig
    from blip3o_jax.train.sections import DiffusionRlConfig
    from blip3o_jax.train.workdir import own_workdir

    cfg = tiny.config(
        stage="grpo",
        joint=None,
        grpo=GrpoConfig(
            train="alternating",
            phase_steps=3,
            num_generations=4,
            num_inference_steps=2,
            guidance_scale=None,
            diffusion=DiffusionRlConfig(num_train_timesteps=1, old_ramp=0.3),
        ),
        init=dict.fromkeys(PARTS, "random"),
        num_steps=NUM_STEPS,
        log_every=EVERY,
        eval_every=NUM_STEPS,
        checkpoint_every=EVERY,
    )
    prompts_at, heldout = of_world(cfg)

    def load_part(name, part):
        return random_params(cfg.blip3o())[part]

    def score(images, metadata):
        light = images.astype(np.float64).mean(axis=(1, 2, 3)) / 255
        return lambda: (light[:, None], {})

    with own_workdir(cfg, workdir):
        run = reinforced(cfg, prompts_at, heldout, tiny.text(), score, load_part)
        loop.run(cfg, workdir, run)


STAGES = {"pretrain_ar": train, "grpo": reinforce}


def process(workdir: paths.AnyPath, stage: str, index: int, count: int, port: int) -> None:
    """Process `index` of a run."""
    import jax

    from blip3o_jax.parallel.processes import start_processes
    from blip3o_jax.train import stop

    os.environ["XLA_FLAGS"] = ""
    if count > 1:
        names = {
            "COORDINATOR": f"127.0.0.1:{port}",
            "NUM_PROCESSES": str(count),
            "PROCESS_ID": str(index),
        }
        os.environ |= {f"BLIP3O_{name}": value for name, value in names.items()}
    with stop.handled(process=True):  # as `blip3o-jax train` does it
        start_processes(timeout=int(LONGEST))
        STAGES[stage](workdir)
        if count > 1:
            jax.distributed.shutdown()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def log_of(workdir: paths.AnyPath, name: int | str) -> pathlib.Path:
    """What a process says, on the disk of the folder where this began."""
    folder = pathlib.Path(workdir.name)
    folder.mkdir(exist_ok=True)
    return folder / f"log.{name}"


def temporary(workdir: paths.AnyPath) -> bool:
    """Whether a checkpoint is being written."""
    from blip3o_jax.training_checkpoint import complete

    folder = workdir / "checkpoints"
    if paths.is_bucket(folder):
        return folder.is_dir() and len(list(folder.iterdir())) > len(complete(folder))
    return folder.is_dir() and any("tmp" in child.name for child in folder.iterdir())


def newest(workdir: paths.AnyPath) -> int:
    """Step of the newest whole checkpoint, 0 without one."""
    from blip3o_jax.training_checkpoint import complete

    return max((int(folder.name) for folder in complete(workdir / "checkpoints")), default=0)


def until_killed(
    workdir: paths.AnyPath,
    stage: str,
    count: int,
    rng: random.Random,
    span: float | None,
    number: signal.Signals = signal.SIGKILL,
    late: bool = False,
) -> str:
    """One start of the run, ended by the signal `number` at a random moment within `span` seconds,
    or never; says when: "writing" a checkpoint, "between", or not at all, "finished".

    Half of the time the first checkpoint after a random moment is waited for, and struck. `late`
    waits until there is a whole one to resume from.
    RuntimeError when a process fails by itself.
    """
    port, began = free_port(), time.monotonic()
    own = workdir, stage
    children = [fork(log_of(workdir, i), process, *own, i, count, port) for i in range(count)]
    moment, aimed, delay = (
        began + (rng.uniform(0, span) if span else 1e9),
        rng.random() < 0.5,
        rng.uniform(0, 0.2),
    )
    ended = {}
    while len(ended) < count and not (
        time.monotonic() > moment
        and (not late or newest(workdir))
        and (not aimed or temporary(workdir))
    ):
        for child in children:
            if child not in ended and (found := os.waitpid(child, os.WNOHANG))[0]:
                ended[child] = os.waitstatus_to_exitcode(found[1])
        if any(ended.values()) or time.monotonic() > began + LONGEST:
            [os.kill(child, signal.SIGKILL) for child in children if child not in ended]
            raise RuntimeError(f"A process failed or hung by itself: {tail(workdir)}")
        time.sleep(0.001)
    if len(ended) == count:
        return "finished"
    time.sleep(delay if aimed else 0)
    when = "writing" if temporary(workdir) else "between"
    rng.shuffle(children)
    for child in children:  # the others learn of it, or not, before they go too
        if child not in ended:
            os.kill(child, number)
            time.sleep(rng.uniform(0, 0.1))
    codes = {os.waitstatus_to_exitcode(os.waitpid(x, 0)[1]) for x in set(children) - set(ended)}
    # A child may have ended by itself just before, or not have listened yet. What loses another to
    # SIGKILL fails in its own way, if it is not struck before it notices.
    alone = count == 1 or number != signal.SIGKILL
    if alone and not codes <= {0, -number, EXITS.get(number, 0)}:
        raise RuntimeError(f"{number.name} gave {sorted(codes)}: {tail(workdir)}")
    return when


def tail(workdir: paths.AnyPath) -> str:
    logs = sorted(log_of(workdir, 0).parent.glob("log.*"))
    return "".join(f"\n{log.name}:\n{log.read_text()[-3000:]}" for log in logs)


def resumed(workdir: paths.AnyPath) -> int | None:
    """The step from which the last start went on; None when it was killed before it said so."""
    log = log_of(workdir, 0).read_text() if log_of(workdir, 0).exists() else ""
    if found := re.search(r"Resumed at step (\d+)", log):
        return int(found[1])
    return 0 if re.search(r"Stage \w+ on mesh", log) else None


def compare(*workdirs: paths.AnyPath) -> None:
    """AssertionError when the last checkpoints of two runs differ in a bit of any array, Adam's
    moments and counters included."""
    import jax
    import orbax.checkpoint as ocp

    def read(reader, folder):
        if paths.is_bucket(folder):
            copy = pathlib.Path(tempfile.mkdtemp(dir="."), folder.name)
            paths.copy_folder(folder, copy)
            folder = copy.absolute()
        tree = reader.metadata(folder).item_metadata.tree
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=on_host))

    for item in ("model", "optimizer"):
        folders = [workdir / "checkpoints" / str(NUM_STEPS) / item for workdir in workdirs]
        with ocp.PyTreeCheckpointer() as reader:
            left, right = (read(reader, folder) for folder in folders)
        jax.tree.map(np.testing.assert_array_equal, left, right)
        assert len(jax.tree.leaves(left)) > 2


def rounds(
    number: int,
    stage: str,
    count: int,
    seed: int,
    folder: paths.AnyPath,
    signals: list[signal.Signals],
) -> dict:
    """Kills `number` times, with each of `signals` in turn; a run that finishes is compared and a
    new one begun. The report."""
    rng, kinds = random.Random(seed), collections.Counter()
    # the first one compiles, so only the second tells how long a run takes
    for reference in (folder / "first", folder / "reference"):
        reference.mkdir()
        began = time.monotonic()
        if (
            until_killed(reference, stage, count, rng, None) != "finished"
            or newest(reference) != NUM_STEPS
        ):
            raise RuntimeError(f"The uninterrupted run did not finish: {tail(reference)}")
    span = time.monotonic() - began
    finished = wrong = elsewhere = resumes = starts = kills = 0
    began, workdir = time.monotonic(), folder / "run0"
    workdir.mkdir()
    while kills < number or not finished:
        expected = newest(workdir)
        ends = signals[kills % len(signals)]
        limit, is_last = span if kills < number else None, kills == number - 1
        when = until_killed(workdir, stage, count, rng, limit, ends, late=is_last)
        starts += 1
        found = resumed(workdir)
        resumes += bool(found)
        elsewhere += found is not None and found != expected
        if when != "finished":
            kinds.update([when, ends.name])
            kills += 1
            continue
        finished += 1
        if os.waitpid(fork(log_of(workdir, "compare"), compare, workdir, reference), 0)[1]:
            wrong += 1
            print(f"Run {finished} differs: {tail(workdir)}", file=sys.stderr)
        workdir = folder / f"run{finished}"
        workdir.mkdir()
    return {
        "processes": count,
        "rounds": kills,
        "signals": {each.name: kinds[each.name] for each in signals},
        "killed_while_writing": kinds["writing"],
        "killed_between": kinds["between"],
        "resumed": resumes,
        "resumed_elsewhere_than_newest_whole": elsewhere,
        "runs_finished": finished,
        "runs_with_other_bits": wrong,
        "seconds_a_round": round((time.monotonic() - began) / starts, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--stage", choices=STAGES, default="pretrain_ar")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--bucket", choices=["gs", "s3"], help="that holds the workdir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", default="KILL", help="e.g. TERM,INT,USR1,KILL, in turn")
    args = parser.parse_args()
    signals = [signal.Signals[f"SIG{name}"] for name in args.signals.split(",")]
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Imported here and forked from here, so that a round need not; no device is touched before the
    # fork.
    import orbax.checkpoint  # noqa: F401

    from blip3o_jax.kernels.platform import enable_compilation_cache

    enable_compilation_cache()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(temporary))
        folder = pathlib.Path(temporary)
        if args.bucket:
            folder = new_bucket(stack.enter_context(servers()), args.bucket)
        report = rounds(args.rounds, args.stage, args.processes, args.seed, folder, signals)
    print(json.dumps({"stage": args.stage, "bucket": args.bucket} | report))
    return int(report["resumed_elsewhere_than_newest_whole"] or report["runs_with_other_bits"])


if __name__ == "__main__":
    sys.exit(main())
