"""The compile report: it reads what ptxas made and names every defect."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.compile import report as compile_report
from benchmarks.compile.report import blocks_per_sm, compile_case, staleness
from tests.benchmarks.compile.example_kernels import product_case, sums_case
from vmoe_kernels.common.launch import triton_version

PRODUCT = product_case("product/bf16", torch.bfloat16)
CLEAN = compile_report.Compiled("k", 90, 4, 1, 64, 0, 0, 4096, 4, 0, 0, 0, 1, 0, True, 0, 0, 8)


@pytest.mark.parametrize(("capability", "field"), [(80, "mma"), (90, "wgmma"), (100, "tcgen05")])
def test_compile_case_finds_tensor_core_instructions(capability, field):
    row = compile_case(PRODUCT, capability)
    counts = {name: getattr(row, name) for name in ("mma", "wgmma", "tcgen05")}
    assert counts.pop(field) > 0
    assert set(counts.values()) == {0}
    assert row.registers > 0
    assert row.shared > 0
    assert row.problems() == []


def test_compile_case_reports_a_spilling_kernel():
    row = compile_case(sums_case("sums", 1 << 13, 1), 90)
    assert row.stack > 0
    assert row.local > 0
    assert any("stack" in problem for problem in row.problems())
    assert any("spills" in problem for problem in row.problems())


def test_compile_case_excepts_full_precision_products():
    row = compile_case(product_case("product/fp32", torch.float32, "ieee", block=16), 90)
    assert (row.dots, row.ieee_dots, row.wgmma + row.mma) == (0, 1, 0)
    assert row.problems() == []


def test_compile_case_reports_an_undeclared_product():
    row = compile_case(product_case("product/bf16", torch.bfloat16, has_dot=False), 90)
    assert ["has_dot" in problem for problem in row.problems()] == [True]


def test_compile_case_names_missing_arguments():
    case = dataclasses.replace(PRODUCT, constexprs={"BLOCK": 64})
    with pytest.raises(ValueError, match=r"product/bf16: signature and constexprs must name .*'PRECISION'"):
        compile_case(case, 90)


def test_compile_case_refuses_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_case(PRODUCT, 90)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"local": 3}, "3 local-memory"),
        ({"shared": 232_449}, "shared memory, the chip has 232448"),
        ({"tensor_memory": 513}, "513 tensor-memory columns"),
        ({"wgmma": 0, "mma": 4}, "without wgmma"),
        ({"dots": 0}, "no tl.dot"),
        ({"descriptors": 1}, "a tensor descriptor without TMA"),
    ],
)
def test_problems_names_each_defect(change, problem):
    assert CLEAN.problems() == []
    (found,) = dataclasses.replace(CLEAN, **change).problems()
    assert problem in found
    assert found.startswith("k on sm_90 ")


def test_collect_keeps_to_the_modules_asked_for(monkeypatch):
    sums = sums_case("running_sums/1024", 1024, 4)
    other = dataclasses.replace(sums, name="other", kernel="another.module:kernel")
    monkeypatch.setattr(compile_report, "capture", lambda chip: [sums, PRODUCT, other])
    assert len(compile_report.collect([])) == 9
    jobs = compile_report.collect(["tests.benchmarks.compile.example_kernels"])
    assert jobs == [(case, chip) for case in (PRODUCT, sums) for chip in (80, 90, 100)]
    with pytest.raises(ValueError, match="must hold a kernel that the ops launch"):
        compile_report.collect(["vmoe_kernels.common.launch"])


def _compiled(case):
    row = compile_case(case, 90)
    assert row.made_from == compile_report.made_from(case, 90)
    return row


def test_what_was_made_from_the_same_is_not_made_again(tmp_path, monkeypatch):
    sums = sums_case("running_sums/1024", 1024, 4)
    monkeypatch.setattr(compile_report, "collect", lambda modules: [(sums, 90)])
    # A row of numbers that no compiler gives, to see where rows come from.
    row = dataclasses.replace(CLEAN, made_from=compile_report.made_from(sums, 90), instructions=12_345)
    compile_report.write([row], tmp_path)
    known = compile_report.reported(tmp_path)
    assert known == {row.made_from: row}
    renamed = dataclasses.replace(row, name=sums.name)
    assert compile_report.compile_all([], 1, known) == [renamed]
    assert compile_report.compile_all([], 1) == compile_report.compile_all([], 1, {"else": row}) == [_compiled(sums)]
    assert compile_report.reported(tmp_path / "none") == {}


def test_all_that_decides_what_a_launch_becomes_is_in_its_digest(monkeypatch):
    sums = sums_case("running_sums/1024", 1024, 4)
    digest = compile_report.made_from(sums, 90)
    assert compile_report.made_from(dataclasses.replace(sums, name="another", grid=(9,)), 90) == digest
    others = [
        dataclasses.replace(sums, num_warps=8),
        dataclasses.replace(sums, num_stages=7),
        dataclasses.replace(sums, max_registers=64),
        dataclasses.replace(sums, divisible=()),
        sums_case("running_sums/1024", 2048, 4),
        PRODUCT,
    ]
    digests = {compile_report.made_from(other, 90) for other in others} | {compile_report.made_from(sums, 80), digest}
    assert len(digests) == len(others) + 2
    monkeypatch.setattr(compile_report.triton, "__version__", "0.1")
    assert compile_report.made_from(sums, 90) not in digests
    monkeypatch.undo()
    monkeypatch.setattr(compile_report, "_reading", lambda: ["count otherwise"])
    assert compile_report.made_from(sums, 90) not in digests


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "blocks"),
    [(32, 0, 4, 16), (128, 0, 8, 2), (168, 0, 4, 3), (32, 100_000, 4, 2), (16, 0, 1, 32)],
)
def test_blocks_per_sm_takes_the_scarcest_resource(registers, shared, num_warps, blocks):
    assert blocks_per_sm(90, registers, shared, num_warps) == blocks


def test_report_lists_every_config_and_goes_stale(tmp_path):
    folder = tmp_path / "deeper" / "reports"
    assert staleness([CLEAN], folder) == ["reports holds no report; run python -m benchmarks.compile.report"]
    compile_report.write([CLEAN], folder)
    name = f"triton-{triton_version()}"
    content = json.loads((folder / f"{name}.json").read_text())
    assert content["rows"] == [dataclasses.asdict(CLEAN)]
    assert set(content["versions"]) == {"torch", "triton"}
    assert "| k | sm_90 | 4 | 1 | 64 | 0 | 0 | 4096 | 4 | 0 | 0 | 0 | 8 |" in (folder / f"{name}.md").read_text()
    assert staleness([CLEAN], folder) == []
    assert staleness([], folder) == [
        f"k on sm_90 is gone but listed in {name}; run python -m benchmarks.compile.report with that version"
    ]
    # The report of another version goes stale by itself.
    (folder / "triton-0.1.json").write_text(json.dumps({"rows": []}))
    assert staleness([CLEAN], folder) == [
        "k on sm_90 is missing in triton-0.1; run python -m benchmarks.compile.report with that version"
    ]


@pytest.mark.parametrize(
    ("field", "change"),
    [("registers", 1), ("shared", 16), ("step", 3), ("instructions", 3), ("blocks_per_sm", -1), ("buffers", -1)],
)
def test_a_number_that_got_worse_is_named(field, change, tmp_path, monkeypatch):
    compile_report.write([CLEAN], tmp_path)
    before = getattr(CLEAN, field)
    bad, good = (dataclasses.replace(CLEAN, **{field: before + each}) for each in (change, -change))
    assert compile_report.worse([CLEAN, good], tmp_path) == []
    (found,) = compile_report.worse([bad], tmp_path)
    assert found.startswith(
        f"k on sm_90 has {field} {before + change}, in triton-{triton_version()} {before}; where that"
    )
    # Another Triton makes other code, and a new config is nobody's.
    assert compile_report.worse([dataclasses.replace(bad, name="new")], tmp_path) == []
    monkeypatch.setattr(compile_report.triton, "__version__", "0.1")
    assert compile_report.worse([bad], tmp_path) == []


def test_an_instruction_more_is_as_it_may_be_on_another_machine(tmp_path):
    compile_report.write([CLEAN], tmp_path)
    same = dataclasses.replace(CLEAN, step=CLEAN.step + 2, instructions=CLEAN.instructions + 2)
    assert compile_report.worse([same], tmp_path) == []


def test_check_fails_on_a_defect(capsys, monkeypatch):
    spilling = dataclasses.replace(CLEAN, stack=16)
    monkeypatch.setattr(compile_report, "compile_all", lambda modules, processes, known: [spilling])
    assert compile_report.main(["--check", "some.module"]) == 1
    assert "16 bytes of stack" in capsys.readouterr().err
    monkeypatch.setattr(compile_report, "compile_all", lambda modules, processes, known: [CLEAN])
    assert compile_report.main(["--check", "some.module"]) == 0
