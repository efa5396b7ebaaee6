"""Measured choices: one JSON file per device, refused where it does not speak of this device or these candidates."""

import re
import warnings
from pathlib import Path
from typing import Any

import msgspec

from kernels.tuning.candidates import BUCKETS, Config, Weight, space_hash


class TableRefused(Exception):
    """A table cannot be used here; the message says why and what to do."""


class TableWarning(UserWarning):
    """A table is used, or left aside, with a doubt that an operator should know of."""


class Row(msgspec.Struct, frozen=True):
    """What was measured for a weight at a number of rows (one of BUCKETS).

    `config` is the fastest, None where cuBLAS was. `fraction`: the time that the machine's own bandwidth or arithmetic
    allows, over `microseconds`. `exact_microseconds` is what an exact step pays, None where it was not measured.
    """

    op: str
    out_features: int
    in_features: int
    dtype: str
    rows: int
    config: Config | None
    microseconds: float
    fraction: float
    cublas_microseconds: float
    exact_microseconds: float | None = None
    candidates: int = 0

    @property
    def weight(self) -> Weight:
        return Weight(self.op, self.out_features, self.in_features, self.dtype)


class Device(msgspec.Struct, frozen=True):
    """What a table must have been measured on to be used: "NVIDIA H200", (9, 0); and with which versions."""

    name: str
    capability: tuple[int, int]
    triton: str
    torch: str = ""

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


class Ceilings(msgspec.Struct, frozen=True):
    """What the machine itself does, measured in the run that a table comes from: copying, and cuBLAS at its best."""

    gigabytes_per_second: float
    teraflops: float


class Table(msgspec.Struct, frozen=True):
    """`space` is the hash of the candidates that were measured, `date` the day of the last measurement."""

    device: Device
    date: str
    space: str
    ceilings: Ceilings
    rows: tuple[Row, ...]

    def choices(self, weight: Weight) -> dict[int, Config | None]:
        """Bucket → choice, of the buckets that were measured. An addition is like none, where only one was measured."""
        found = {row.rows: row.config for row in self.rows if row.weight == weight}
        sibling = {"linear": "linear_add", "linear_add": "linear"}.get(weight.op)
        if found or sibling is None:
            return found
        other = msgspec.structs.replace(weight, op=sibling)
        return {row.rows: row.config for row in self.rows if row.weight == other}

    def merged(self, newer: "Table") -> "Table":
        """`newer` with the rows of this one that it does not measure; of one device and space."""
        measured = {(row.weight, row.rows) for row in newer.rows}
        kept = tuple(row for row in self.rows if (row.weight, row.rows) not in measured)
        return msgspec.structs.replace(newer, rows=kept + newer.rows)


def read(file: Path, here: Device) -> Table:
    """The table in `file`; raises TableRefused where it was measured on another device or over other candidates."""
    try:
        table = msgspec.json.decode(file.read_bytes(), type=Table)
    except (OSError, msgspec.MsgspecError) as error:
        raise TableRefused(f"{file} is not a tuning table ({error}); write one with `sluice tune`") from error
    if (table.device.name, table.device.capability) != (here.name, here.capability):
        raise TableRefused(f"{file} was measured on {table.device}, this is {here}; write another with `sluice tune`")
    if table.space != space_hash():
        raise TableRefused(
            f"{file} was measured over other candidates (space {table.space}, now {space_hash()}); "
            "measure again with `sluice tune`"
        )
    unknown = {row.rows for row in table.rows} - set(BUCKETS)
    if unknown:
        raise TableRefused(
            f"{file} has rows for {sorted(unknown)}, none of {BUCKETS}; measure again with `sluice tune`"
        )
    return table


def write(file: Path, table: Table) -> None:
    """One line per row, in order, so that two tables can be compared by eye."""
    head: dict[str, Any] = msgspec.to_builtins(table)
    rows = sorted(table.rows, key=lambda row: (row.op, row.out_features, row.in_features, row.dtype, row.rows))
    lines = [
        f'"{name}": {msgspec.json.encode(head[name]).decode()}' for name in ("device", "date", "space", "ceilings")
    ]
    lines.append('"rows": [\n' + ",\n".join(msgspec.json.encode(row).decode() for row in rows) + "\n]")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def file_of(folder: Path, device: str) -> Path:
    """Where the table of a device lies: "NVIDIA H200" → nvidia-h200.json."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


class Tables:
    """The tables of a folder, each read once per process.

    `other_triton` counts tables in use that another Triton version measured, `refused` those left aside.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.other_triton = 0
        self.refused = 0
        self._read: dict[str, Table | None] = {}

    def of(self, here: Device) -> Table | None:
        """The table for a device; None, which means the stated defaults, where there is none that speaks of it."""
        if here.name not in self._read:
            self._read[here.name] = self._open(here)
        return self._read[here.name]

    def _open(self, here: Device) -> Table | None:
        file = file_of(self.folder, here.name)
        if not file.is_file():
            return None
        try:
            table = read(file, here)
        except TableRefused as refusal:
            self.refused += 1
            warnings.warn(TableWarning(f"{refusal}; until then stated defaults are used"), stacklevel=3)
            return None
        if table.device.triton != here.triton:
            self.other_triton += 1
            told = f"{file} was measured with Triton {table.device.triton}, this is {here.triton}: it is used as it is"
            warnings.warn(TableWarning(told), stacklevel=3)
        return table
