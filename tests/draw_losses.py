#!/usr/bin/env python3
"""draw_losses.py - training losses of several runs, drawn over each other.

    tests/draw_losses.py OUT.svg TITLE NAME=RUN/metrics.jsonl ...

The left panel shows the updates that the second run reached, each run as it is named: the first as
a line, the second as a wide pale line below it, the third as dots.  The right panel shows the whole
first run.  Below the left panel: the first run's loss less the second's."""
import json
import sys
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, GAP = 960, 420, 60, 50, 70
INK, PALE, RUN, OTHER, DOT = "#444", "#ddd", "#1f5fae", "#f0b070", "#b03030"


def read(path):
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"]) for r in rows if r["kind"] == "train"]


class Panel:
    def __init__(self, x, y, w, h, xs, ys):
        self.x, self.y, self.w, self.h, self.xs, self.ys = x, y, w, h, xs, ys

    def at(self, step, value):
        fx = (step - self.xs[0]) / (self.xs[1] - self.xs[0])
        fy = (value - self.ys[0]) / (self.ys[1] - self.ys[0])
        return f"{self.x + fx * self.w:.1f},{self.y + self.h - fy * self.h:.1f}"

    def axes(self, marks_x, marks_y, form):
        out = []
        for v in marks_y:
            x, y = self.at(self.xs[0], v).split(",")
            out.append(f'<path d="M{x},{y}h{self.w}" stroke="{PALE}"/>'
                       f'<text x="{float(x) - 6}" y="{float(y) + 4}" text-anchor="end">'
                       f"{form % v}</text>")
        for v in marks_x:
            x, y = self.at(v, self.ys[0]).split(",")
            out.append(f'<text x="{x}" y="{float(y) + 16}" text-anchor="middle">{v}</text>')
        return out

    def line(self, points, color, width):
        d = "M" + "L".join(self.at(*p) for p in points)
        return f'<path d="{d}" fill="none" stroke="{color}" stroke-width="{width}"/>'


def main():
    out_path, title, *runs = sys.argv[1:]
    names, curves = zip(*[(n, read(p)) for n, p in (r.split("=", 1) for r in runs)])
    most = curves[1][-1][0]
    near = [p for p in curves[0] if p[0] <= most]
    less = [(a[0], a[1] - b[1]) for a, b in zip(near, curves[1])]
    bound = max(abs(v) for _, v in less)
    width = (WIDTH - 2 * LEFT - GAP) / 2
    top = Panel(LEFT, TOP, width, 210, (1, most), (0, 12))
    low = Panel(LEFT, TOP + 250, width, 70, (1, most), (-bound, bound))
    all_of_it = Panel(LEFT + width + GAP, TOP, width, 320, (1, curves[0][-1][0]), (0, 12))
    ticks = [1] + list(range(20, most + 1, 20))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
           f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="{INK}">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
           f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>']
    out += top.axes(ticks, range(0, 13, 3), "%d") + low.axes(ticks, (-bound, 0, bound), "%.3f")
    out += all_of_it.axes([1] + list(range(200, curves[0][-1][0] + 1, 200)), range(0, 13, 3), "%d")
    out.append(top.line(curves[1], OTHER, 7))
    out.append(top.line(near, RUN, 1.5))
    for p in curves[2] if len(curves) > 2 else []:
        x, y = top.at(*p).split(",")
        out.append(f'<circle cx="{x}" cy="{y}" r="3.2" fill="none" stroke="{DOT}"/>')
    out.append(low.line(less, RUN, 1.2))
    out.append(all_of_it.line(curves[0], RUN, 1))
    for i, (name, color) in enumerate(zip(names, (RUN, OTHER, DOT))):
        y = TOP + 20 + 18 * i
        mark = (f'<path d="M{LEFT + 190},{y - 4}h24" stroke="{color}" stroke-width="{(1.5, 7)[i]}"/>'
                if i < 2 else f'<circle cx="{LEFT + 202}" cy="{y - 4}" r="3.2" fill="none" '
                f'stroke="{color}"/>')
        out.append(mark + f'<text x="{LEFT + 222}" y="{y}">{escape(name)}</text>')
    out.append(f'<text x="{LEFT}" y="{TOP + 244}">{escape(names[0])} less {escape(names[1])}</text>')
    out.append(f'<text x="{all_of_it.x + 8}" y="{TOP - 6}">{escape(names[0])}, all updates</text>')
    out.append(f'<text x="{LEFT}" y="{TOP - 6}">loss (nats per byte) by update</text></svg>')
    with open(out_path, "w", encoding="utf-8") as f:
        f.write("\n".join(out) + "\n")


main()
