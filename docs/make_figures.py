"""Draws the figures of the pages of docs that explain routing; every number in them comes from our own layers.

python docs/make_figures.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from torch import Tensor

import vmoe_kernels as kernels
from vmoe_torch.layers import MoeMlp

FIGURES = Path(__file__).parent / "figures"
# Okabe and Ito's, which colour-blind readers can tell apart; an expert each.
EXPERT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
GREY, PALE = "#6E6E6E", "#ECECEC"
TOKENS, EXPERTS, SELECTED, WIDTH = 12, 4, 2, 4
# Room that a panel of slots has at least, for what is written under it.
LEAST_SLOTS = 5


def example() -> tuple[Tensor, Tensor]:
    """Tokens (T, D) and a router (E, D) that likes its first expert best, so that something is dropped."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    x[:, 0] += 0.9
    return x, 1.3 * torch.eye(EXPERTS, WIDTH)


def route(capacity: int, batch_priority: bool) -> kernels.Routing:
    """The example's routing."""
    x, router = example()
    return kernels.route(
        x,
        router,
        num_selected_experts=SELECTED,
        capacity=capacity,
        group_size=TOKENS,
        last_capacity=capacity,
        batch_priority=batch_priority,
    )


def _blank(axes: Axes, width: float, height: float) -> None:
    axes.set_xlim(-0.1, width + 0.1)
    axes.set_ylim(height + 0.1, -0.1)
    axes.set_aspect("equal")
    axes.axis("off")


def routing() -> Figure:
    """Gates of every token over the experts; the K largest are outlined and numbered by rank."""
    routed = route(TOKENS, False)
    gates = routed.logits.softmax(-1)
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(gates.T, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for token in range(TOKENS):
        for expert in range(EXPERTS):
            gate = gates[token, expert].item()
            ink = "black" if gate > 0.55 else "white"
            axes.text(token, expert, f"{gate:.2f}", ha="center", va="center", color=ink, fontsize=8.5)
        for rank in range(SELECTED):
            expert = routed.experts[token, rank].item()
            style = {"edgecolor": "#F0E442", "linewidth": 2.5, "linestyle": ("-", ":")[rank]}
            axes.add_patch(Rectangle((token - 0.46, expert - 0.46), 0.92, 0.92, fill=False, **style))
    axes.set_xticks(range(TOKENS))
    axes.set_yticks(range(EXPERTS), [f"expert {expert}" for expert in range(EXPERTS)])
    axes.set_xlabel("token of the group")
    axes.set_title("Gates: softmax over experts. First choice: solid frame, second choice: dotted", fontsize=11)
    figure.colorbar(image, ax=axes, label="gate", pad=0.01)
    return figure


def _buffers(axes: Axes, routed: kernels.Routing, capacity: int, title: str) -> None:
    """Each expert's slots with the token in each, and what was dropped."""
    rows = capacity
    holder: dict[int, tuple[int, int]] = {}
    dropped = []
    for token in range(TOKENS):
        for rank in range(SELECTED):
            slot = routed.slots[token, rank].item()
            if slot < 0:
                dropped.append((token, rank))
            else:
                holder[slot] = (token, rank)
    _blank(axes, 2.6 + max(rows, LEAST_SLOTS), EXPERTS + 1.8)
    for expert in range(EXPERTS):
        axes.text(2.4, expert + 0.5, f"expert {expert}", ha="right", va="center", fontsize=9)
        for slot in range(rows):
            held = holder.get(expert * rows + slot)
            if held is None:
                axes.add_patch(Rectangle((2.65 + slot, expert + 0.05), 0.9, 0.9, facecolor=PALE))
            else:
                token, rank = held
                colour = EXPERT_COLOURS[expert]
                face, ink = (colour, "white") if rank == 0 else ("white", colour)
                axes.add_patch(
                    Rectangle((2.65 + slot, expert + 0.05), 0.9, 0.9, facecolor=face, edgecolor=colour, lw=1.5)
                )
                axes.text(3.1 + slot, expert + 0.5, str(token), ha="center", va="center", color=ink, fontsize=9)
    axes.set_title(title, fontsize=10)
    lost = [token for token in range(TOKENS) if (routed.slots[token] < 0).all()]
    text = f"{len(dropped)} of {TOKENS * SELECTED} choices dropped"
    text += "\n" + (f"tokens without any slot: {', '.join(map(str, lost))}" if lost else "every token has a slot")
    axes.text(0.1, EXPERTS + 0.45, text, va="top", fontsize=9, color=GREY)


def capacity() -> Figure:
    """The same choices under three capacities, in the order of position."""
    figure = Figure(figsize=(10.4, 2.7), layout="constrained")
    factors = (1.5, 1.0, 0.5)
    sizes = [kernels.compute_capacity(TOKENS, EXPERTS, factor, SELECTED, multiple_of=1) for factor in factors]
    panels = figure.subplots(1, len(factors), width_ratios=[2.8 + max(size, LEAST_SLOTS) for size in sizes])
    for axes, factor, size in zip(panels, factors, sizes):
        _buffers(axes, route(size, False), size, f"factor {factor:g}: {size} slots per expert")
    figure.suptitle(
        "Slots, filled in order of position (numbers are tokens; filled: first choices, framed: second)", fontsize=11
    )
    return figure


def batch_priority() -> Figure:
    """Who is kept at half capacity: by position, and by the largest gate."""
    size = kernels.compute_capacity(TOKENS, EXPERTS, 0.5, SELECTED, multiple_of=1)
    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    for axes, priority, name in zip(figure.subplots(2, 1, sharex=False), (False, True), ("vanilla", "BPR")):
        routed = route(size, priority)
        largest = routed.gates[:, 0]
        order = torch.argsort(largest, descending=True, stable=True) if priority else torch.arange(TOKENS)
        for place, token in enumerate(order.tolist()):
            kept = (routed.slots[token] >= 0).sum().item()
            colour = EXPERT_COLOURS[0] if kept == SELECTED else "#56B4E9" if kept else "white"
            axes.bar(place, largest[token].item(), 0.8, color=colour, edgecolor=GREY)
            axes.text(place, largest[token].item() + 0.02, f"{kept}", ha="center", fontsize=9, color=GREY)
        axes.set_xticks(range(TOKENS), [str(token) for token in order.tolist()])
        axes.set_ylim(0, 1.15)
        axes.set_ylabel("largest gate")
        axes.set_xlabel("token, in the order in which slots are given away")
        lost = sum(largest[token].item() for token in range(TOKENS) if (routed.slots[token] < 0).all())
        axes.set_title(
            f"{name}: above each bar, how many of the token's {SELECTED} choices have a slot; "
            f"largest gates lost: {lost:.2f} in all",
            fontsize=10,
        )
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def dispatch_combine() -> Figure:
    """Rows of the buffer copied from tokens, experts run on their rows, tokens summed from rows."""
    tokens, size = 6, 3
    x, router = example()
    routed = kernels.route(
        x[:tokens],
        router,
        num_selected_experts=SELECTED,
        capacity=size,
        group_size=tokens,
        last_capacity=size,
        batch_priority=True,
    )
    rows = EXPERTS * size
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    left, middle, right = panels = figure.subplots(1, 3, width_ratios=(0.7, 2, 1.4))
    step = rows / tokens
    for axes, title in zip(panels, ("tokens x", "buffer: E x C rows, one expert MLP per colour", "outputs y")):
        axes.set_xlim(0, 2 if axes is middle else 1)
        axes.set_ylim(rows + 0.2, -0.2)
        axes.axis("off")
        axes.set_title(title, fontsize=10)
    holder = {routed.slots[token, rank].item(): token for token in range(tokens) for rank in range(SELECTED)}
    for row in range(rows):
        colour = EXPERT_COLOURS[row // size]
        held = holder.get(row)
        face = PALE if held is None else colour
        middle.add_patch(Rectangle((0, row + 0.06), 2, 0.88, facecolor=face, edgecolor=colour, linewidth=1.2))
        text = (
            f"row {row}: empty" if held is None else f"row {row}: expert {row // size}, slot {row % size}, token {held}"
        )
        middle.text(1, row + 0.5, text, ha="center", va="center", fontsize=8.5, color=GREY if held is None else "white")
    for token in range(tokens):
        y = (token + 0.5) * step
        terms = [
            f"{routed.gates[token, rank]:.2f} $\\cdot$ row {routed.slots[token, rank]}"
            for rank in range(SELECTED)
            if routed.slots[token, rank] >= 0
        ]
        output = f"y[{token}] = " + (" + ".join(terms) or "0")
        for axes, begin, text in ((left, 0.0, f"x[{token}]"), (right, 0.15, output)):
            width = 0.5 if axes is left else 0.84
            axes.add_patch(Rectangle((begin, y - 0.42), width, 0.84, facecolor="white", edgecolor=GREY))
            axes.text(begin + width / 2, y, text, ha="center", va="center", fontsize=8.5)
        for rank in range(SELECTED):
            row = routed.slots[token, rank].item()
            if row < 0:
                continue
            colour, at = EXPERT_COLOURS[row // size], row + 0.5
            line = {"coordsA": "data", "coordsB": "data", "color": colour, "linewidth": 1.3, "arrowstyle": "-|>"}
            figure.add_artist(ConnectionPatch((0.5, y), (0, at), axesA=left, axesB=middle, **line))
            figure.add_artist(ConnectionPatch((2, at), (0.15, y), axesA=middle, axesB=right, **line))
    figure.suptitle("Dispatch copies rows, the experts run, combine sums K rows weighted by the gates", fontsize=11)
    return figure


def drawing() -> Tensor:
    """(12, 12, 3): a sky with a sun, a tree, and the ground."""
    names = {"s": (0.45, 0.70, 0.95), "y": (0.98, 0.80, 0.15), "t": (0.10, 0.50, 0.20), "g": (0.62, 0.45, 0.28)}
    rows = ["ssssssssssss"] * 8 + ["gggggggggggg"] * 4
    picture = torch.tensor([[names[kind] for kind in row] for row in rows])
    picture[1:4, 8:11] = torch.tensor(names["y"])
    for top, left, right in ((3, 3, 5), (4, 2, 6), (5, 1, 7), (6, 1, 7), (7, 3, 5), (8, 3, 5)):
        picture[top, left:right] = torch.tensor(names["t"])
    shade = 0.06 * torch.randn(12, 12, 1, generator=torch.Generator().manual_seed(1))
    return (picture + shade).clamp(0, 1)


@torch.no_grad()
def soft_moe() -> Figure:
    """Which patches the slots of a soft layer draw from, and what some patches get back."""
    picture = drawing()
    tokens = picture.flatten(0, 1) - picture.mean((0, 1))
    layer = MoeMlp(3, num_experts=EXPERTS, router="soft", slots_per_expert=1)
    patches = {"sky": (2, 2), "sun": (2, 9), "tree": (5, 4), "ground": (10, 9)}
    # Slots that look for the colours of these patches.
    colours = torch.stack([tokens[12 * row + column] for row, column in patches.values()])
    layer.router.mu.copy_(colours.t().unsqueeze(-1))
    layer.router.scale.fill_(4.0)
    routed = layer.router(tokens, layer.groups(144, 144))
    figure = Figure(figsize=(9.2, 5.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    for place, axes in enumerate(above.subplots(1, 1 + EXPERTS)):
        axes.set_xticks([])
        axes.set_yticks([])
        if place == 0:
            axes.imshow(picture)
            axes.set_title("144 patches", fontsize=10)
            for name, (row, column) in patches.items():
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.6))
                axes.text(column, row - 0.8, name, ha="center", va="bottom", fontsize=8)
            continue
        shares = routed.mix[0, :, place - 1].view(12, 12)
        axes.imshow(100 * shares, cmap="cividis", vmin=0)
        axes.set_title(f"slot of expert {place - 1}", fontsize=10, color=EXPERT_COLOURS[place - 1])
        axes.set_xlabel(f"{100 * shares.min():.2f} to {100 * shares.max():.1f} %", fontsize=9)
    above.suptitle("Dispatch: the share of every patch in a slot; over the patches they sum to 1", fontsize=11)
    for axes, (name, (row, column)) in zip(below.subplots(1, len(patches), sharey=True), patches.items()):
        gates = routed.gates[12 * row + column]
        axes.bar(range(EXPERTS), gates.tolist(), color=EXPERT_COLOURS)
        for expert, gate in enumerate(gates.tolist()):
            axes.text(expert, gate + 0.02, f"{gate:.2f}", ha="center", fontsize=9, color=GREY)
        axes.set_xticks(range(EXPERTS))
        axes.set_xlabel("slot of expert")
        axes.set_ylim(0, 1.1)
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    below.suptitle("Combine: the share of every slot's output in what a patch gets back; they sum to 1", fontsize=11)
    return figure


def threshold() -> Figure:
    """The gates of every token's choices in the colours of their experts, pale where below the threshold."""
    routed = route(TOKENS, False)
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, mean in zip(panels, (1.5, 0.75)):
        wanted = round(TOKENS * mean)
        tau = routed.gates.flatten().sort(descending=True).values[wanted - 1].item()
        numbers = (routed.gates >= tau).sum(1).tolist()
        for token in range(TOKENS):
            for rank in range(SELECTED):
                gate, colour = routed.gates[token, rank].item(), EXPERT_COLOURS[routed.experts[token, rank]]
                style = {"color": colour} if gate >= tau else {"facecolor": "white", "edgecolor": colour, "alpha": 0.5}
                axes.bar(token + 0.38 * (rank - 0.5), gate, width=0.34, **style)
            axes.text(token, 1.02, numbers[token], ha="center", va="bottom", fontsize=9)
        axes.axhline(tau, color=GREY, linestyle="--", linewidth=1)
        axes.text(TOKENS - 0.42, tau, f"threshold {tau:.2f}", va="bottom", ha="left", fontsize=8, color=GREY)
        axes.set_title(f"{mean:g} experts per token: {wanted} of {TOKENS * SELECTED} choices kept", fontsize=10, pad=16)
        axes.set_ylim(0, 1.0)
        axes.set_xlim(-0.6, TOKENS + 0.9)
        axes.set_ylabel("gate")
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_xticks(range(TOKENS))
    panels[1].set_xlabel("token of the group; above each, its number of experts")
    return figure


def main(folder: Path = FIGURES) -> None:
    """Draws all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (routing, capacity, batch_priority, dispatch_combine, threshold, soft_moe):
        draw().savefig(folder / f"{draw.__name__}.png", dpi=130)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
