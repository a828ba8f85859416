"""What `impl="auto"` is on cards that are not here: their properties are made up, Triton and the compiler as well."""

import json
import shutil
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import vmoe_kernels as vk
from benchmarks.compile.report import REPORTS, SHARED_PER_BLOCK
from vmoe_kernels.common import card, impl
from vmoe_kernels.common.launch import ANY

CUDA = torch.device("cuda:0")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
H100 = {"name": "NVIDIA H100", "major": 9, "minor": 0, "shared_memory_per_block_optin": 232_448}
RTX_3090 = {"name": "NVIDIA GeForce RTX 3090", "major": 8, "minor": 6, "shared_memory_per_block_optin": 101_376}
T4 = {"name": "Tesla T4", "major": 7, "minor": 5, "shared_memory_per_block_optin": 65_536}


@pytest.fixture(autouse=True)
def asked_anew():
    """Answers hold for a process; here, for a test."""
    impl.choose.cache_clear()
    impl.warn_once.cache_clear()
    yield
    impl.choose.cache_clear()
    impl.warn_once.cache_clear()


@pytest.fixture
def fake(monkeypatch):
    """Puts a card into this machine, on which an empty kernel runs."""

    def put(properties: dict, fault: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
        monkeypatch.setattr(card, "launch_fault", lambda device: fault)
        monkeypatch.setattr(card, "c_compiler", lambda: "/usr/bin/gcc")
        monkeypatch.setattr(card, "IMPORT_FAULT", None)

    return put


@pytest.mark.parametrize("properties", [H100, RTX_3090], ids=lambda card: card["name"])
def test_a_card_that_can_launch_them_runs_the_kernels(fake, properties):
    fake(properties)
    for dtype in (BF16, torch.float16, FP32):
        assert impl.choose(CUDA, dtype).impl == "triton"
        assert not impl.takes_twin(CUDA, dtype)
    assert impl.choose(CUDA, FP64).impl == "reference"
    # Which is no fault of the card's: no warning.
    assert impl.takes_twin(CUDA, FP64)


def test_an_old_card_takes_the_twin_and_says_so_once(fake):
    fake(T4)
    with pytest.warns(
        UserWarning, match=r"plain PyTorch on cuda:0: Triton needs compute capability 8\.0, and Tesla T4"
    ):
        assert impl.takes_twin(CUDA, BF16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert impl.takes_twin(CUDA, BF16)
        assert impl.takes_twin(CUDA, FP32)


@pytest.mark.parametrize(
    ("properties", "needed"),
    [
        ({**H100, "shared_memory_per_block_optin": 204_831}, 204_832),
        ({**RTX_3090, "shared_memory_per_block_optin": 65_536}, 66_048),
    ],
)
def test_a_card_with_little_shared_memory_takes_the_twin(fake, properties, needed):
    fake(properties)
    choice = impl.choose(CUDA, BF16)
    has = properties["shared_memory_per_block_optin"]
    assert choice.impl == "reference"
    assert f"need {needed:,} bytes of shared memory a block, and {properties['name']} has {has:,}" in choice.reason
    impl.choose.cache_clear()
    fake({**properties, "shared_memory_per_block_optin": needed})
    assert impl.choose(CUDA, BF16).impl == "triton"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("card.IMPORT_FAULT", "Triton is not installed", "Triton is not installed"),
        ("card.c_compiler", lambda: None, "Triton finds no C compiler"),
        ("card.launch_fault", lambda device: "Triton cannot launch", "Triton cannot launch"),
        ("torch.version.hip", "7.0", "this PyTorch is built for ROCm"),
        ("sys.platform", "win32", "Triton supports Linux, and this is win32"),
    ],
)
def test_a_machine_without_what_triton_needs_takes_the_twin(fake, monkeypatch, name, value, reason):
    fake(H100)
    owner, _, attribute = name.rpartition(".")
    owner = {"card": card, "torch.version": torch.version, "sys": card.sys}[owner]
    monkeypatch.setattr(owner, attribute, value)
    choice = impl.choose(CUDA, BF16)
    assert choice.impl == "reference"
    assert reason in choice.reason
    with pytest.warns(UserWarning, match=reason):
        assert impl.takes_twin(CUDA, BF16)


def test_the_empty_kernel_tells_what_is_missing(monkeypatch):
    def refuses(device):
        raise RuntimeError("\nno kernel image\nfor this device")

    monkeypatch.setattr(torch.cuda, "device", refuses)
    assert card.launch_fault(CUDA).startswith(
        "Triton cannot launch a kernel that does nothing (RuntimeError: no kernel i"
    )
    monkeypatch.setattr(card, "python_headers", lambda: None)
    assert "Python.h is missing" in card.launch_fault(CUDA)


def test_the_compiler_is_the_one_that_triton_takes(monkeypatch):
    monkeypatch.setenv("CC", "/opt/cc")
    assert card.c_compiler() == "/opt/cc"
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", {"clang": "/usr/bin/clang"}.get)
    assert card.c_compiler() == "/usr/bin/clang"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert card.c_compiler() is None


def test_other_devices():
    for device, want in (("cpu", "cpu"), ("meta", "cpu"), ("mps", "reference")):
        assert impl.choose(torch.device(device), FP32).impl == want
    assert impl.choose(torch.device("mps"), FP32).reason == "there are no kernels for mps"
    assert impl.choose(torch.device("cpu"), FP64).impl == "cpu"


def test_explicit_triton_is_not_talked_out_of_it(fake):
    fake(T4)
    x = SimpleNamespace(device=CUDA, dtype=BF16)
    assert not impl.use_reference("triton", x)
    with pytest.warns(UserWarning, match="Tesla T4"):
        assert impl.use_reference("auto", x)


def test_a_compiled_call_takes_the_twin_as_well(monkeypatch):
    """As a card that cannot launch the kernels does; here the CPU stands for it."""
    monkeypatch.setattr(impl, "choose", lambda device, dtype: impl.Choice("reference", "made up"))
    slots, gates = torch.tensor([[1], [0], [-1]], dtype=torch.int32), torch.rand(3, 1)
    buffer, ran = torch.randn(2, 4), []

    def backend(graph, inputs):
        ran.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    call = torch.compile(lambda x: vk.combine(x, slots, gates), backend=backend, fullgraph=True)
    with pytest.warns(UserWarning, match="plain PyTorch on cpu: made up"):
        got = call(buffer)
    assert torch.equal(got, vk.combine_reference(buffer, slots, gates))
    assert ran
    assert not any("vmoe" in each for each in ran)


def test_a_launch_that_fails_names_the_way_out(monkeypatch):
    """Triton's own error, from below an op, as a card that nobody has tried may give it."""
    errors = pytest.importorskip("triton.runtime.errors", reason="needs Triton")

    def launcher(x):
        raise errors.OutOfResources(200_000, 101_376, "shared memory")

    kept = {}
    op = SimpleNamespace(register_kernel=lambda device: lambda call: kept.update({device: call}))
    impl.register_triton(op, launcher)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pytest.raises(
        RuntimeError, match=r"cannot run on cpu \(OutOfResources: out of resource.*impl='reference' does"
    ):
        kept["cuda"](torch.ones(1))


def test_shared_memory_is_what_the_compile_report_says():
    """Of the most demanding launch, by the more demanding of the Triton versions."""
    needed: dict[int, int] = {}
    for file in REPORTS.glob("triton-*.json"):
        for row in json.loads(file.read_text())["rows"]:
            needed[row["capability"]] = max(needed.get(row["capability"], 0), row["shared"])
    # Launches that other chips share with sm_80 are in the report once, under it.
    assert needed[80] >= max(needed[86], needed[89], needed[120])
    assert {ANY: needed[80], "sm90": needed[90], "sm100": needed[100]} == card.SHARED_MEMORY
    for capability, most in SHARED_PER_BLOCK.items():
        assert card.shared_memory(divmod(capability, 10)) <= most
    # The least of the chips from sm_80 on: sm_86, sm_89, sm_120.
    assert card.shared_memory((12, 0)) == card.shared_memory((8, 6)) <= 101_376
