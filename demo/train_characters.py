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
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from characters import read_documents
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from training import ATTENTIONS, MOST_NOISE, SETTINGS, Curve, Plan, Setting, compare, noise_ratio

COLOURS = dict(zip(SETTINGS, ("#0072b2", "#009e73", "#d55e00", "#cc79a7"), strict=True))
"""Those of Okabe and Ito ("Color universal design", 2008), which all people can tell apart."""


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
    """Curves and how far they are apart, in one picture, as SVG and PNG."""
    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "mtlflashattn",
    }
    with rc_context(style):
        figure = Figure(figsize=(12, 3.8), layout="constrained")
        dense, ragged, apart = figure.subplots(1, 3)
        for setting, curves in results.items():
            axes, colour = ragged if setting.is_ragged else dense, COLOURS[setting]
            dtype = str(setting).partition(",")[0]
            losses = {name: curve.losses for name, curve in curves.items()}
            axes.plot(
                losses["stock"], color=colour, linewidth=5, alpha=0.3, label=f"{dtype}, stock"
            )
            # Curves lie on one another: the later one lets the earlier one show.
            dashes = "-" if dtype == "float32" else (0, (3, 3))
            axes.plot(losses["ours"], color=colour, linestyle=dashes, label=f"{dtype}, ours")
            for name, line in (("ours", "-"), ("stock, math", ":")):
                so_far = accumulate(curves[name].distances(curves["stock"]), max)
                # 0 has no place on a logarithmic axis.
                visible = [distance if distance > 0 else float("nan") for distance in so_far]
                apart.semilogy(
                    visible, line, color=colour, label=str(setting) if line == "-" else None
                )
        dense.set(title="Loss, sequences of equal length", ylabel="cross entropy, nats")
        ragged.set(title="Loss, ragged sequences, packed")
        apart.set(title="Largest distance from stock so far")
        apart.plot([], [], ":", color="#666666", label="stock's two implementations")
        for axes in (dense, ragged, apart):
            axes.set(xlabel="step")
            axes.legend(frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> int:
    """Trains, prints a table, draws the picture; fails where our curve is beyond the noise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of each model (default 200)")
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
                setting, plan, text, after_step=partial(progress.advance, task)
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
