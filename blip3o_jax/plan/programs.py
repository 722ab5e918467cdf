"""A run's programs, lowered for TPUs that are not here; parameters are shapes, not arrays."""

import dataclasses
import logging
import os
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from blip3o_jax.chips import CHIPS, GPUS, Chip, parse_topology
from blip3o_jax.errors import InputError, first_line, require
from blip3o_jax.kernels.platform import dtype_for
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.batches import check_batch
from blip3o_jax.parallel.mesh import BATCH
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.train import steps
from blip3o_jax.train.config import TrainConfig

log = logging.getLogger(__name__)


def open_topology(name: str) -> tuple[list[jax.Device], Chip]:
    """(devices, chip) of e.g. "v5e:4x4"; InputError for an unknown one or without libtpu.

    A GPU, whose compiler is not here, is one device with the temporaries of a v5p.
    """
    if name in GPUS:
        log.warning("%s: bytes are an estimate, those that the compiler of a v5p needs.", name)
        return open_topology("v5p:2x2x1")[0][:1], CHIPS[name]
    chip, _ = parse_topology(name)
    # libtpu reads these once, when it is loaded: it must neither ask a cloud's server what this
    # machine is, nor refuse a second plan at the same time.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, platform="tpu").devices, chip
    except (RuntimeError, ImportError, OSError) as error:
        problem = f"The TPU's compiler cannot be loaded ({first_line(error)})"
        raise InputError(f"{problem}; pip install 'blip3o-jax[tpu]'.") from error


def on_accelerator(cfg: TrainConfig) -> TrainConfig:
    """The config as an accelerator runs it."""
    return dataclasses.replace(cfg, dtype=dtype_for(cfg.dtype, on="tpu"))


def shallow(cfg: TrainConfig, depth: int) -> TrainConfig:
    """The run with `depth` layers of each transformer and at most as many of each of the
    autoencoder's stages: what costs minutes less to compile and has the same kinds of everything.
    """
    require(depth >= 1, f"--depth is at least 1, not {depth}.")
    model = cfg.blip3o()
    encoder = model.ta_tok.encoder.num_hidden_layers
    # The encoder's last layers are loaded and not used.
    unread = -model.ta_tok.select_layer_id - 1
    layers = {
        "qwen3.num_hidden_layers": min(depth, model.qwen3.num_hidden_layers),
        "sana.num_layers": min(depth, model.sana.num_layers),
        "ta_tok.encoder.num_hidden_layers": min(depth + unread, encoder),
    }
    for side in ("encoder_layers_per_block", "decoder_layers_per_block"):
        layers[f"dc_ae.{side}"] = tuple(min(depth, count) for count in getattr(model.dc_ae, side))
    return dataclasses.replace(cfg, model={**cfg.model, **layers})


def _shape(x: jax.ShapeDtypeStruct, place: jax.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def placed(tree, mesh: Mesh, without: str = ""):
    """Shapes of parameters where the sharding table puts them, as `shardings` has it."""
    return jax.tree.map(_shape, tree, shardings(tree, mesh, without))


def abstract_batch(cfg: TrainConfig, mesh: Mesh) -> dict:
    """Shapes of a global batch of the run's stage, sharded along the mesh."""
    place = jax.NamedSharding(mesh, BATCH)
    arrays = cfg.record.batch(cfg.blip3o(), cfg.data, cfg.batch_size)
    return {name: _shape(x, place) for name, x in arrays.items()}


@dataclass(frozen=True)
class Program:
    """A lowered program: its arguments, the same by kind, FLOPs and images of one run in all; and
    `beside`, what lies on the devices while it runs and is none of its arguments."""

    lowered: jax.stages.Lowered
    arguments: tuple
    kinds: dict
    flops: int | None
    images: int
    beside: dict = field(default_factory=dict)  # by kind


def abstract_state(cfg: TrainConfig, model: Blip3o, mesh: Mesh) -> tuple[dict, dict]:
    """Shapes of (state, frozen) of a run where training would put them."""
    abstract = jax.eval_shape(
        lambda: steps.init_state(cfg, model.init(jax.random.key(0), cfg.parts))
    )
    return placed(abstract[0], mesh), placed(abstract[1], mesh)


def kinds_of(state: dict) -> dict:
    """A state by kind, for the table."""
    names = {"params": "parameters", "opt_state": "optimizer", "ema": "average"}
    kinds = {kind: state.get(name) for name, kind in names.items()}
    kinds["counters"] = {name: tree for name, tree in state.items() if name not in names}
    return kinds


def lower_step(cfg: TrainConfig, mesh: Mesh) -> Program:
    """The run's training step; InputError where batch or parameters do not divide."""
    check_batch(cfg.batch_size, mesh, cfg.accumulate)
    batch = abstract_batch(cfg, mesh)
    with jax.set_mesh(mesh):
        model = Blip3o(cfg.blip3o(), jnp.dtype(cfg.dtype), cfg.remat)
        state, frozen = abstract_state(cfg, model, mesh)
        places = jax.tree.map(lambda x: x.sharding, state)
        lowered = steps.compile_step(model, cfg, places).lower(state, frozen, batch)
    kinds = kinds_of(state) | {"frozen": frozen, "batch": batch}
    count = cfg.record.flops(cfg.blip3o(), cfg.section, batch)
    return Program(lowered, (state, frozen, batch), kinds, count, cfg.batch_size)
