"""Candidates, tables and the tuner; what needs a GPU is at the end."""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
import torch.nn.functional as F

from kernels.tuning import candidates as space
from kernels.tuning.candidates import BUCKETS, Config, Weight, all_candidates, candidates, default, exact
from kernels.tuning.models import MODELS, weights_of
from kernels.tuning.table import Ceilings, Device, Row, Table, TableRefused, Tables, TableWarning, file_of, read, write
from kernels.tuning.tuner import Tuner, difference, floor_microseconds, measure_ceilings
from services.cli import tune
from tests.cli.test_flags import sluice
from tests.counts import count

HERE = Device("NVIDIA H200", (9, 0), "3.7.1", "2.13.0")
WEIGHTS = [weight for sizes in MODELS.values() for weight in weights_of(**sizes, dtype="bfloat16")]
SMALL = Weight("linear_add", 256, 256)
ON_GPU = torch.cuda.is_available()


def row_of(weight: Weight, rows: int, config: Config | None = None, microseconds: float = 1.0) -> Row:
    return Row(
        weight.op, weight.out_features, weight.in_features, weight.dtype, rows, config, microseconds, 0.5, 2.0, 3.0, 4
    )


def table_with(*rows: Row, device: Device = HERE, date: str = "2026-01-02") -> Table:
    return Table(device, date, space.space_hash(), Ceilings(4300.0, 790.0), rows)


@pytest.mark.parametrize("weight", WEIGHTS, ids=tune._name)
def test_all_candidates_fit_and_fill_a_device_or_try_to(weight):
    for bucket in BUCKETS:
        found = candidates(weight, bucket)
        assert 4 <= len(found) <= 40
        assert len(set(found)) == len(found)
        for config in found:
            assert space.shared_need(weight, config) <= space.SHARED_BYTES
            assert space.partial_bytes(weight, bucket, config.split) <= space.MAX_PARTIAL_BYTES
            assert config.split * space.MIN_STEPS <= math.ceil(weight.in_features / config.tile_depth)
            assert bucket > space.SKINNY_ROWS or config.tile_rows == max(16, bucket)


def test_the_last_bucket_has_no_bound_so_nothing_is_kept_for_its_rows():
    assert {config.split for config in candidates(WEIGHTS[1], BUCKETS[-1])} == {1}


def test_a_larger_shared_memory_allows_more():
    assert len(all_candidates(WEIGHTS[0], 227 * 1024)) > len(all_candidates(WEIGHTS[0], 99 * 1024)) > 0


@pytest.mark.parametrize("weight", WEIGHTS, ids=tune._name)
def test_what_is_chosen_without_a_table_is_measured_too(weight):
    for bucket in (1, 2, 4, 8, 16):
        assert default(weight, bucket) in candidates(weight, bucket)
    assert default(weight, 64) == exact(weight)
    assert default(weight, 128) is None


def test_a_small_shared_memory_lowers_the_stages_of_defaults_and_nothing_else():
    for weight in WEIGHTS:
        large, small = exact(weight), exact(weight, 64 * 1024)
        assert small.stages < large.stages
        assert msgspec.structs.replace(small, stages=large.stages) == large
        assert space.shared_need(weight, small) <= 64 * 1024
        assert space.shared_need(weight, default(weight, 1, 64 * 1024)) <= 64 * 1024


def test_float32_is_left_to_cublas_but_for_exact_steps():
    weight = Weight("linear", 4096, 4096, "float32")
    assert [candidates(weight, bucket) for bucket in BUCKETS] == [[]] * len(BUCKETS)
    assert default(weight, 1) is None
    assert exact(weight).tile_rows == 32


def test_every_number_of_rows_has_the_next_larger_bucket():
    for rows in [*range(1, 300), 1024, 1025, 2048, 10**6]:
        index = space.bucket_index(rows)
        assert BUCKETS[index] >= min(rows, BUCKETS[-1])
        assert index == 0 or BUCKETS[index - 1] < rows


def test_another_space_has_another_hash(monkeypatch):
    before = space.space_hash()
    monkeypatch.setattr(space, "SPLITS", (1, 2))
    assert space.space_hash() != before


def test_known_models_are_those_that_are_compiled():
    declared = pytest.importorskip("kernels.fused.declared")
    shapes = {shape.name: shape for shape in declared.SHAPES}
    for name, sizes in MODELS.items():
        assert sizes == {field: getattr(shapes[name], field) for field in sizes}


def test_a_table_comes_back_as_it_was_written_one_line_a_row(tmp_path):
    config = candidates(SMALL, 1)[0]
    table = table_with(row_of(SMALL, 1, config), row_of(SMALL, 2))
    write(tmp_path / "new" / "t.json", table)
    assert read(tmp_path / "new" / "t.json", HERE) == table
    text = (tmp_path / "new" / "t.json").read_text()
    assert sum(line.startswith('{"op"') for line in text.splitlines()) == 2
    assert json.loads(text)["ceilings"] == {"gigabytes_per_second": 4300.0, "teraflops": 790.0}


def test_a_table_knows_a_weight_by_op_sizes_and_dtype():
    config = candidates(SMALL, 1)[0]
    table = table_with(row_of(SMALL, 1, config), row_of(SMALL, 8))
    assert table.choices(SMALL) == {1: config, 8: None}
    assert table.choices(msgspec.structs.replace(SMALL, op="linear")) == {1: config, 8: None}
    for other in ({"op": "gated_linear"}, {"dtype": "float16"}, {"out_features": 4}, {"in_features": 4}):
        assert table.choices(msgspec.structs.replace(SMALL, **other)) == {}


def test_newer_rows_replace_older_ones():
    old = table_with(row_of(SMALL, 1), row_of(SMALL, 2), date="2026-01-01")
    merged = old.merged(table_with(row_of(SMALL, 2, microseconds=5.0)))
    assert merged.date == "2026-01-02"
    assert merged.rows == (row_of(SMALL, 1), row_of(SMALL, 2, microseconds=5.0))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": msgspec.structs.replace(HERE, name="NVIDIA A100")}, "on NVIDIA A100.*this is NVIDIA H200"),
        ({"device": msgspec.structs.replace(HERE, capability=(10, 0))}, "capability 10.0.*capability 9.0"),
        ({"space": "0123"}, "other candidates.*0123.*sluice tune"),
        ({"rows": (row_of(SMALL, 3),)}, r"rows for \[3\]"),
    ],
    ids=["device", "capability", "space", "rows"],
)  # fmt: skip
def test_a_table_is_refused_with_the_reason(change, reason, tmp_path):
    write(tmp_path / "t.json", msgspec.structs.replace(table_with(row_of(SMALL, 1)), **change))
    with pytest.raises(TableRefused, match=reason):
        read(tmp_path / "t.json", HERE)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"device": 3}'])
def test_junk_is_no_table(content, tmp_path):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(TableRefused, match="not a tuning table"):
        read(tmp_path / "t.json", HERE)


def put(folder: Path, table: Table) -> Tables:
    write(file_of(folder, HERE.name), table)
    return Tables(folder)


def test_the_table_of_a_device_is_read_once(tmp_path):
    assert file_of(tmp_path, HERE.name).name == "nvidia-h200.json"
    tables = put(tmp_path, table_with(row_of(SMALL, 1)))
    first = tables.of(HERE)
    assert first is not None
    file_of(tmp_path, HERE.name).unlink()
    assert tables.of(HERE) is first
    assert (tables.refused, tables.other_triton) == (0, 0)


def test_without_a_table_there_is_nothing_to_say(tmp_path):
    assert Tables(tmp_path).of(HERE) is None


def test_another_triton_is_warned_of_and_counted_once(tmp_path):
    tables = put(tmp_path, table_with(row_of(SMALL, 1)))
    newer = msgspec.structs.replace(HERE, triton="3.8.0")
    with pytest.warns(TableWarning, match=r"measured with Triton 3\.7\.1, this is 3\.8\.0"):
        assert tables.of(newer) is not None
    assert tables.of(newer) is not None  # a second warning would be an error
    assert (tables.refused, tables.other_triton) == (0, 1)


def test_a_table_that_is_refused_is_left_aside_and_counted(tmp_path):
    tables = put(tmp_path, msgspec.structs.replace(table_with(row_of(SMALL, 1)), space="0123"))
    with pytest.warns(TableWarning, match="other candidates.*stated defaults"):
        assert tables.of(HERE) is None
    assert tables.of(HERE) is None
    assert (tables.refused, tables.other_triton) == (1, 0)


class Pretend:
    """In place of kernels and clock: every configuration has a cost, some are broken."""

    def __init__(self, costs: dict[Config | None, float], broken: dict[Config, str] | None = None) -> None:
        self.costs, self.broken = costs, broken or {}
        self.cost = 0.0
        self.calls = 0

    def prepare(self, weight, config, num_rows, *, exact=False):
        fault = self.broken.get(config, "")
        if fault == "raises":
            raise ValueError("out of resource: shared memory")

        def compute(x, w, residual):
            self.cost = 50.0 if exact else self.costs.get(config, 100.0)
            self.calls += 1
            y = torch.addmm(residual, x, w.t()) if residual is not None else F.linear(x, w)
            faults = {"zeros": y * 0, "swapped": y.flip(0), "nan": y / 0, "scaled": y * 1.01, "noisy": y + self.calls}
            return faults.get(fault, y)

        return compute

    def times(self, runs, launches):
        assert launches >= 2
        measured = []
        for run in runs:
            for i in range(3):
                run(i)
            measured.append(self.cost)
        return measured


def tuner_of(pretend: Pretend) -> Tuner:
    return Tuner(pretend.prepare, pretend, Ceilings(4300.0, 790.0), device="cpu", l2_bytes=2**18)


def test_the_tuner_keeps_the_fastest_and_says_what_the_others_took():
    fast = candidates(SMALL, 8, 227 * 1024)[3]
    [row] = tuner_of(Pretend({fast: 4.0, None: 6.0})).tune(SMALL, [8])
    assert (row.weight, row.rows, row.config) == (SMALL, 8, fast)
    assert (row.microseconds, row.cublas_microseconds, row.exact_microseconds) == (4.0, 6.0, 50.0)
    assert row.fraction == pytest.approx(floor_microseconds(SMALL, 8, Ceilings(4300.0, 790.0)) / 4.0, abs=1e-4)
    assert row.candidates == 1 + len(candidates(SMALL, 8, 227 * 1024))


def test_cublas_may_win():
    rows = list(tuner_of(Pretend({None: 1.0})).tune(SMALL, [1, 64]))
    assert [row.config for row in rows] == [None, None]


@pytest.mark.parametrize("fault", ["zeros", "swapped", "nan", "scaled", "noisy", "raises"])
def test_a_wrong_candidate_may_not_win(fault):
    wrong, right = candidates(SMALL, 8, 227 * 1024)[:2]
    tuner = tuner_of(Pretend({wrong: 1.0, right: 2.0, None: 6.0}, {wrong: fault}))
    [row] = tuner.tune(SMALL, [8])
    assert row.config == right
    [(weight, rows, config, reason)] = tuner.refused
    assert (weight, rows, config) == (SMALL, 8, wrong)
    assert reason


def test_a_result_rounded_to_bfloat16_is_right():
    wide = torch.randn(64, 64)
    assert difference(wide.to(torch.bfloat16), wide) == ""
    assert "differs" in difference(wide * 1.01, wide)


def test_the_floor_is_memory_for_few_rows_and_arithmetic_for_many():
    weight, ceilings = Weight("gated_linear", 14336, 4096), Ceilings(4300.0, 790.0)
    assert floor_microseconds(weight, 1, ceilings) == pytest.approx(54.6, abs=0.1)
    assert floor_microseconds(weight, 4096, ceilings) == pytest.approx(1217.8, abs=0.1)


def test_ceilings_are_what_the_clock_says():
    pretend = Pretend({})
    pretend.cost = 100.0
    assert measure_ceilings(pretend, "cpu", megabytes=1, size=64) == Ceilings(21.0, 0.0)


def test_a_dry_run_lists_what_would_be_measured():
    done = sluice("tune", "--dry-run", "--model", "Llama-3.1-8B", "--shape", "linear_add:4096x14336", "--jobs", "4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + 5 + 2
    assert lines[2].startswith("linear_add:4096x4096 bfloat16")
    assert "5 weights" in lines[-2]
    assert space.space_hash() in lines[-1]


def test_a_checkpoint_may_be_named():
    done = sluice("tune", "--dry-run", "--model", "ops/demo_model/model", "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    assert "float16" in done.stdout.splitlines()[1]


@pytest.mark.skipif(ON_GPU, reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_to_do():
    done = sluice("tune")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no CUDA device 0 here" in done.stderr
    assert "--dry-run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--device", "cpu"), "only GPUs are tuned"),
        (("--shape", "linear:4096"), "OP:OUTxIN"),
        (("--shape", "square:4x4"), "linear_add"),
        (("--model", "/no/such/folder"), "there is no folder"),
    ],
)
def test_a_command_that_cannot_be_followed_is_refused(arguments, told):
    done = sluice("tune", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_the_table_is_written_after_each_weight_and_extended_later(tmp_path, capsys):
    file, ceilings = tmp_path / "t.json", Ceilings(4300.0, 790.0)
    other = msgspec.structs.replace(SMALL, op="linear")

    def fill(weights, device=HERE):
        pretend = Pretend({None: 1.0})
        tuner = Tuner(pretend.prepare, pretend, ceilings, device="cpu", l2_bytes=2**18)
        tune.fill(file, device, ceilings, weights, tuner)
        return read(file, device)

    def interrupted():
        yield SMALL
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(interrupted())
    assert len(read(file, HERE).rows) == len(BUCKETS)
    assert len(fill([other]).rows) == 2 * len(BUCKETS)
    assert len(fill([other]).rows) == 2 * len(BUCKETS)
    assert "x cuBLAS" in capsys.readouterr().out
    assert len(fill([SMALL], msgspec.structs.replace(HERE, triton="3.8.0")).rows) == len(BUCKETS)
    assert "replaced" in capsys.readouterr().out


@pytest.mark.parametrize("op", space.OPS)
def test_forms_are_started_once_beforehand(op):
    pytest.importorskip("triton")
    weight = Weight(op, 64, 64)
    device = "cuda:0" if ON_GPU else "cpu"
    assert tune.compile_some((weight, candidates(weight, 1)[:2], device)) == 2


@pytest.mark.timeout(1800)
def test_every_candidate_compiles_and_spills_nothing():
    pytest.importorskip("triton")
    targets = (90, 80, 100)[: count("compile_targets")]
    program = f"""
from kernels.fused.declared import candidate_forms
from kernels.fused.prove import MAX_SHARED_BYTES, prove
for target in {targets}:
    forms = candidate_forms(MAX_SHARED_BYTES[target])
    for form in forms[:: max(1, len(forms) // {count("candidate_forms")})]:
        report = prove("", form, target)
        print(report.kernel, report.registers, report.problem and (report.problem, target, report.constants))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) >= 6
    assert [line for line in lines if not line.strip().removeprefix("_linear_kernel").strip().isdigit()] == []


@pytest.mark.skipif(not ON_GPU, reason="measures on a GPU")
def test_the_tuner_on_a_gpu(tmp_path):
    tune._measure([Weight(op, 256, 512) for op in space.OPS], "cuda", 1, tmp_path / "t.json")
    table = msgspec.json.decode((tmp_path / "t.json").read_bytes(), type=Table)
    assert len(table.rows) == 3 * len(BUCKETS)
    assert all(0 < row.fraction < 1.5 for row in table.rows)
    assert min(row.candidates for row in table.rows) > 2


def test_buckets_grow():
    assert all(2 * low == high for low, high in pairwise(BUCKETS))
