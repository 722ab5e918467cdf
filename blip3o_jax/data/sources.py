"""Opens the sources of a mixture."""

from blip3o_jax.data import folder, tables, tars
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import Record, RecordError, Source
from blip3o_jax.data.row_groups import RowGroups
from blip3o_jax.errors import InputError, require

OPENERS = {
    "webdataset": tars.TarSource,
    "parquet": tables.ParquetSource,
    "jsonl": tables.JsonlSource,
    "array_record": tables.TfdsSource,
    "folder": folder.FolderSource,
}


def open_source(spec: SourceConfig, groups: RowGroups | None = None) -> Source:
    """The source, which shares the memory `groups` with others; InputError when files are missing,
    damaged or empty."""
    shared = [groups or RowGroups()] if spec.kind == "parquet" else []
    source = OPENERS[spec.kind](spec, *shared)
    empty = f"{spec.path!r} ({spec.kind}) holds no records; remove it."
    require(len(source) > 0, f"data.sources: {empty}")
    return source


def first_record(source: Source) -> Record | dict:
    """The first record that can be read, as a cache's dict if it is from one; InputError when none
    of the first hundred can."""
    reasons = []
    for i in range(min(100, len(source))):
        try:
            return source[i]
        except RecordError as error:
            reasons.append(f"{source.key(i)}: {error}")
    none = f"none of the first {len(reasons)} records can be read"
    raise InputError(f"data.sources: {none}; {reasons[0]}.")
