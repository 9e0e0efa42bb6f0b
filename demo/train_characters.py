"""Trains a character-level transformer with stock attention and with ours, side by side.

The same weights, batches and optimiser four times over: float32 and bfloat16, sequences of equal
length and ragged ones packed behind one another. In each, three models take every step in turn:

* stock: `torch.nn.functional.scaled_dot_product_attention`, for ragged sequences one by one;
* stock, math: the same in torch's other implementation, `SDPBackend.MATH`;
* ours: `flash_attn_func`, or `flash_attn_varlen_func` over all sequences at once.

Training amplifies rounding, so that two right implementations drift apart. How far stock's two do
is the noise that our difference from stock is held against.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from characters import read_documents
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from training import ATTENTIONS, MOST_NOISE, SETTINGS, Curve, Plan, Setting, compare, noise_ratio


def show(results: dict[Setting, dict[str, Curve]]) -> None:
    """A table for the terminal."""
    table = Table(title="Loss of the last 20 steps, and milliseconds of a step (median)")
    for heading in ("", *ATTENTIONS, "ours from stock", "stock's two apart", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for setting, curves in results.items():
        cells = []
        for curve in curves.values():
            loss = statistics.fmean(curve.losses[-20:])
            cells.append(f"{loss:.4f}  {1e3 * statistics.median(curve.seconds):.0f} ms")
        apart = max(curves["stock, math"].distances(curves["stock"]))
        own = max(curves["ours"].distances(curves["stock"]))
        table.add_row(
            str(setting), *cells, f"{own:.1e}", f"{apart:.1e}", f"{noise_ratio(curves):.1f}"
        )
    Console().print(table)


def draw(results: dict[Setting, dict[str, Curve]], path: Path) -> None:
    """Both pictures in one, as SVG and PNG: the curves, and how far they are apart."""
    colours = (
        "#0072b2",
        "#009e73",
        "#d55e00",
        "#cc79a7",
    )  # Okabe and Ito, "Color universal design"
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                  "svg.fonttype": "none", "svg.hashsalt": "mtlflashattn"}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for colour, (setting, curves) in zip(colours, results.items(), strict=True):
            left.plot(curves["stock"].losses, color=colour, linewidth=4, alpha=0.3)
            left.plot(curves["ours"].losses, color=colour, linewidth=1, label=str(setting))
            # 0 has no place on a logarithmic axis.
            for name, line in (("ours", "-"), ("stock, math", ":")):
                distances = [max(d, 1e-8) for d in curves[name].distances(curves["stock"])]
                right.semilogy(distances, line, color=colour, linewidth=1)
        left.set(
            title="Loss: ours (thin) over stock (wide)", xlabel="step", ylabel="cross entropy, nats"
        )
        left.legend(frameon=False)
        right.plot([], [], "-", color="#666666", label="ours from stock")
        right.plot([], [], ":", color="#666666", label="stock's two implementations")
        right.set(title="Distance between losses", xlabel="step")
        right.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=150)


def main() -> int:
    """Trains, prints a table, draws the picture; fails where our curve is beyond the noise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="steps of each model (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument(
        "--picture", type=Path, default=Path("target/train/curves"), help="without ending"
    )
    arguments = parser.parse_args()
    plan, text = Plan(arguments.steps, seed=arguments.seed), read_documents()
    results = {}
    with Progress() as progress:
        for setting in SETTINGS:
            task = progress.add_task(f"{setting!s:24}", total=plan.steps)
            results[setting] = compare(
                setting, plan, text, after_step=lambda t=task: progress.advance(t)
            )
    show(results)
    draw(results, arguments.picture)
    print(f"picture: {arguments.picture.with_suffix('.svg')} and .png")
    beyond = [
        str(setting) for setting, curves in results.items() if noise_ratio(curves) > MOST_NOISE
    ]
    if beyond:
        print(
            f"FAILED: more than {MOST_NOISE:g} times as far from stock as stock's two: {beyond}",
            file=sys.stderr,
        )
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
