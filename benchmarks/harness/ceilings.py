"""What this chip can do at most, measured in the same run: products, copies, a sort and an empty launch."""

import torch

from benchmarks.harness.cases import Case
from benchmarks.harness.protocol import measure
from benchmarks.harness.session import Session
from benchmarks.harness.work import Work

OP = "ceiling"


def run(session: Session) -> None:
    """Fills `session.ceilings`: "matmul" (FLOP/s), "copy" (bytes/s), "sort" and "launch" (seconds)."""
    size = 8192 if session.device.type == "cuda" else 256
    made = {"device": session.device, "dtype": session.dtype}
    # Random data: zeros switch fewer transistors and run faster.
    a, b = torch.randn(2, size, size, **made)
    c = torch.empty(size, size, **made)
    square = Work(3 * a.nbytes, 2 * size**3)
    samples = session.time(OP, "forward", f"{size}^3", {"matmul": lambda: torch.mm(a, b, out=c)}, square)
    session.ceilings["matmul"] = square.flops / samples["matmul"].median

    source = torch.randn((4 << 30 if session.device.type == "cuda" else 1 << 22) // 4, device=session.device)
    target = torch.empty_like(source)
    moved = Work(2 * source.nbytes)
    samples = session.time(OP, "forward", f"{source.nbytes >> 20} MiB", {"copy": lambda: target.copy_(source)}, moved)
    session.ceilings["copy"] = moved.bytes / samples["copy"].median

    keys = torch.randn(25_088, device=session.device)
    calls = {"stable sort": lambda: keys.sort(stable=True)}
    session.ceilings["sort"] = session.time(OP, "forward", "25,088 keys", calls)["stable sort"].median
    one = torch.ones((), device=session.device)
    calls = {"launch": lambda: one.add_(1.0)}
    session.ceilings["launch"] = session.time(OP, "forward", "one element", calls)["launch"].median


def bmm_rate(session: Session, case: Case) -> float:
    """FLOP/s of cuBLAS at the layer's own two products, measured once per shape."""
    name = f"bmm {case.name}"
    if name not in session.ceilings:
        made = {"device": session.device, "dtype": session.dtype}
        x = torch.randn(case.num_experts, case.rows, case.width, **made)
        hidden = torch.randn(case.num_experts, case.rows, case.hidden, **made)
        fc1 = torch.randn(case.num_experts, case.hidden, case.width, **made)
        fc2 = torch.randn(case.num_experts, case.width, case.hidden, **made)
        x_out, hidden_out = torch.empty_like(x), torch.empty_like(hidden)

        def products() -> None:
            torch.bmm(x, fc1.mT, out=hidden_out)
            torch.bmm(hidden, fc2.mT, out=x_out)

        work = Work(2 * (x.nbytes + hidden.nbytes) + fc1.nbytes + fc2.nbytes, case.mlp_flops)
        samples = session.time(OP, "forward", case.name, {"bmm": products}, work)
        session.ceilings[name] = case.mlp_flops / samples["bmm"].median
    return session.ceilings[name]


def repeatability(session: Session) -> float:
    """Ratio of the same product to itself as two variants: what the protocol cannot tell apart."""
    size = 4096 if session.device.type == "cuda" else 128
    a, b = torch.randn(2, size, size, device=session.device, dtype=session.dtype)
    samples = measure({"first": lambda: a @ b, "second": lambda: a @ b}, session.device, session.seconds_per_variant)
    return samples["first"].over(samples["second"]).median
