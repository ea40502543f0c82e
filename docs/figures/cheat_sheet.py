"""Draw the blocks of guide/cheat_sheet.md on a page of A4: ``python docs/figures/cheat_sheet.py``.

The picture notes the SHA-256 of the page that it was made from, and a test compares the two.
"""

import hashlib
import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

GUIDE = Path(__file__).resolve().parent.parent / "guide"
WIDTH, HEIGHT = 210 / 25.4, 297 / 25.4  # inches of A4
POINTS = 72 * HEIGHT
MARGIN, GAP = 26, 9  # points
TITLE, HEADING, CODE = 17, 8.6, 6.9  # sizes of fonts, in points
LINE = 1.27 * CODE
PADDING = 6
COLOURS = {"heading": "#1f5a8a", "code": "#1b1b1b", "comment": "#5f6b75", "box": "#f3f6f9"}


def blocks_of(page):
    """Return the headings of a page, each with the lines of its code."""
    sections = re.findall(r"^## (.+?)\n\n```python\n(.*?)\n```", page, re.DOTALL | re.MULTILINE)
    return [(heading, code.split("\n")) for heading, code in sections]


def height_of(lines):
    """Return the points that a block takes, with the space below it."""
    return HEADING + 2 * PADDING + 2 + LINE * len(lines) + GAP


def columns_of(blocks):
    """Cut the blocks into two columns of about the same height."""
    heights = [height_of(lines) for _, lines in blocks]
    cuts = range(1, len(blocks))
    cut = min(cuts, key=lambda i: abs(sum(heights[:i]) - sum(heights[i:])))
    return blocks[:cut], blocks[cut:]


def draw_block(axes, left, top, width, heading, lines):
    """Draw a box with a heading and code, and comments in another colour."""
    height = height_of(lines) - GAP
    axes.add_patch(
        FancyBboxPatch(
            (left, top - height),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=4",
            facecolor=COLOURS["box"],
            edgecolor="#d3dce4",
            linewidth=0.6,
        )
    )
    left, top = left + PADDING, top - PADDING
    axes.text(left, top, heading, size=HEADING, weight="bold", color=COLOURS["heading"], va="top")
    top -= HEADING + 4
    for line in lines:
        code, comment = re.fullmatch(r"(.*?)((?:^|  )# .*)?", line).groups()
        style = {"size": CODE, "family": "monospace", "va": "top"}
        axes.text(left, top, code, color=COLOURS["code"], **style)
        if comment:
            axes.text(left, top, " " * len(code) + comment, color=COLOURS["comment"], **style)
        top -= LINE


def draw(page):
    """Return the figure of a page."""
    figure = plt.figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 72 * WIDTH), ylim=(0, POINTS))
    axes.axis("off")
    top = POINTS - MARGIN
    axes.text(MARGIN, top, "skqlora", size=TITLE, weight="bold", color=COLOURS["heading"], va="top")
    axes.text(
        MARGIN + 78,
        top - 4,
        "fine-tune a 4-bit language model on your own texts, with a scikit-learn estimator",
        size=HEADING,
        color=COLOURS["comment"],
        va="top",
    )
    width = (72 * WIDTH - 2 * MARGIN - GAP) / 2
    for i, column in enumerate(columns_of(blocks_of(page))):
        left, y = MARGIN + i * (width + GAP), top - TITLE - GAP
        for heading, lines in column:
            draw_block(axes, left, y, width, heading, lines)
            y -= height_of(lines)
    return figure


if __name__ == "__main__":
    mpl.use("Agg")
    text = (GUIDE / "cheat_sheet.md").read_text()
    digest = hashlib.sha256(text.encode()).hexdigest()
    draw(text).savefig(GUIDE / "cheat_sheet.png", dpi=200, metadata={"Source": digest})
