"""Opens the sources of a mixture."""

from blip3o_jax.data import tables, tars
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import Record, RecordError, Source
from blip3o_jax.errors import InputError

OPENERS = {
    "webdataset": tars.TarSource,
    "parquet": tables.ParquetSource,
    "jsonl": tables.JsonlSource,
    "array_record": tables.TfdsSource,
}


def open_source(spec: SourceConfig) -> Source:
    """The source; InputError when files are missing, damaged or empty."""
    source = OPENERS[spec.kind](spec)
    if not len(source):
        raise InputError(f"data.sources: {spec.path!r} ({spec.kind}) holds no records; remove it.")
    return source


def first_record(source: Source) -> Record:
    """The first record that can be read; InputError when none of the first hundred can."""
    reasons = []
    for i in range(min(100, len(source))):
        try:
            return source[i]
        except RecordError as error:
            reasons.append(f"{source.key(i)}: {error}")
    raise InputError(
        f"data.sources: none of the first {len(reasons)} records can be read; {reasons[0]}."
    )
