"""Bar charts of the results as HTML, which follows the page's width and colours."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from report import Found, read, words

Bar = tuple[str, float, str]  # a name, a value, its text

_TPUS = ("v4", "v5e", "v5p", "v6e", "7x")
_FORMS = ("all to conv", "all to dense", "tuned")
_STEPS = ("conv", "dense", "phases", "all to dense", "tuned", "PyTorch")
_PEERS = ("dense", "conv", "tuned", "PyTorch Linear", "PyTorch Conv2d")


def charts(folder: Path) -> dict[str, str]:
    """Return the charts as Markdown pages to include, by name.

    Charts are ``gains-chart``, ``slide-chart``, ``models-chart``, ``cycles-chart``,
    ``layers-chart``, ``loops-chart``, ``training-chart`` and ``peers-chart``.
    """
    cpu = read(folder / "cpu.json")
    cpu.sort(key=lambda r: r["bounds"][0]["value"])  # the largest gain first
    models = [r for r in cpu if r["group"] == "models" and r["case"].endswith("-8")]
    layers = [
        r
        for r in cpu
        if r["case"].endswith("-8-f32") and "original" not in r["milliseconds"]
    ]
    loops = [
        r for r in cpu if r["group"] == "layers" and "original" in r["milliseconds"]
    ]
    steps = [r for r in cpu if r["group"] == "training"]
    return {
        "gains-chart": _gains(folder),
        "slide-chart": bars(
            {r["case"]: [("", r["times"], _times(r["times"]))] for r in slide(folder)},
            "Speedup over the fastest way to run the crops one by one or in batches",
        ),
        "models-chart": bars(
            {words(r["case"], batch=False): _ratios(r, _FORMS) for r in models},
            "Time relative to the original model (shorter is faster)",
            mark=1,
        ),
        "cycles-chart": bars(_cycles(folder), "Cycles relative to the original", 1),
        "layers-chart": bars(
            {words(r["case"], batch=False): _ratios(r, _PEERS) for r in layers},
            "Time relative to the layer's original form (shorter is faster)",
            mark=1,
            most=3,
        ),
        "loops-chart": bars(
            {words(r["case"]): _speedups(r) for r in loops},
            "Speedup over the original loop",
        ),
        "training-chart": bars(
            {words(r["case"]): _ratios(r, _STEPS) for r in steps},
            "Time relative to the step as a convolution, or of the original model",
            mark=1,
            most=2,
        ),
        "peers-chart": bars(
            {words(r["case"]): _against(r) for r in cpu if "keras" in _peer(r)}
            | {words(r["case"]): _against(r) for r in cpu if "jax2onnx" in _peer(r)},
            "Time relative to the file of Keras (LiteRT) or jax2onnx (ONNX)",
            mark=1,
            most=2,
        ),
    }


def bars(
    groups: Mapping[str, Sequence[Bar]],
    caption: str,
    mark: float | None = None,
    most: float | None = None,
) -> str:
    """Return a chart with horizontal bars.

    Args:
      groups: The bars to draw under each name.
      caption: What the length of a bar means.
      mark: A value to mark by a line, such as 1 for the original.
      most: Cut longer bars here; their texts still show the value.

    Returns:
      HTML as a Markdown block.
    """
    values = [value for group in groups.values() for _, value, _ in group]
    scale = min(max([*values, mark or 0]), most or float("inf"))
    fullest = sorted(groups.values(), key=len, reverse=True)  # in its order of labels
    labels = list(dict.fromkeys(label for group in fullest for label, _, _ in group))
    lines = ['<figure class="bars">', f"<figcaption>{html.escape(caption)}"]
    if len(labels) > 1:
        keys = (
            f'<span class="key"><i class="bar-{n}"></i>{html.escape(label)}</span>'
            for n, label in enumerate(labels)
        )
        lines += [f'<span class="keys">{"".join(keys)}</span>']
    lines += ["</figcaption>"]
    line = f" style='--mark: {100 * mark / scale:.1f}%'" if mark else ""
    for name, group in groups.items():
        lines += [f'<div class="bars-group"><b>{html.escape(name)}</b>']
        for label, value, text in group:
            cut = " cut" if value > scale else ""
            width = min(100 * value / scale, 100)
            lines += [
                f'<div class="bars-row" title="{html.escape(label or name)}">'
                f'<span class="track"{line}><i class="bar-{labels.index(label)}{cut}"'
                f' style="width: {width:.1f}%"></i></span><span>{text}</span></div>'
            ]
        lines += ["</div>"]
    return "\n".join(["```{raw} html", *lines, "</figure>", "```"])


def slide(folder: Path) -> list[Found]:
    """Return the figures of ``benchmarks/slide.py``."""
    return json.loads((folder / "slide.json").read_text())["slide"]


def _gains(folder: Path) -> str:
    """The best-known figures of each kind, as speedups, for the first page."""
    found = {r["case"]: r["times"] for r in slide(folder)}
    cpu = {r["case"]: r["bounds"][0]["value"] for r in read(folder / "cpu.json")}
    tpu = {r["case"]: r["bounds"][0]["value"] for r in read(folder / "tpu-v5e.json")}
    speedups = {
        "slide: 100 overlapping crops of an image, plain network": found[
            "plain network, 10x10 crops"
        ],
        "slide: the same with VGG16": found["VGG16"],
        "slide: the same with ResNet-18": found["ResNet-18"],
        "tune: VGG16 on a CPU": 1 / cpu["vgg16-8"],
        "tune: ResNet-50 on a CPU": 1 / cpu["resnet50-8"],
        "tune: ViT-B/16 on a CPU": 1 / cpu["vit-b-8"],
        "tune: ViT-B/16 on TPU v5e, estimated cycles": 1 / tpu["vit-b-8 for tpu:v5e"],
    }
    return bars(
        {name: [("", value, _times(value))] for name, value in speedups.items()},
        "Speedup (the line marks 1x)",
        mark=1,
    )


def _cycles(folder: Path) -> dict[str, list[Bar]]:
    """Tuned cycles as parts of the original's, for each model and TPU generation."""
    found: dict[str, list[Bar]] = {}
    for tpu in _TPUS:
        for r in read(folder / f"tpu-{tpu}.json"):
            ratio = r["bounds"][0]["value"]
            name = words(r["case"].partition(" for ")[0], batch=False)
            found.setdefault(name, []).append((tpu, ratio, f"{tpu} {ratio:.2f}x"))
    return found


def _ratios(found: Found, names: Sequence[str]) -> list[Bar]:
    times = found["milliseconds"]
    original = times.get("original") or times[next(iter(times))]
    return [
        (name, times[name] / original, f"{times[name] / original:.2g}x")
        for name in names
        if name in times and name != "original"
    ]


def _peer(found: Found) -> set[str]:
    """The converter whose file ran beside this package's, if any."""
    timed = found.get("milliseconds", {}) if found["group"] == "peers" else {}
    return set(timed) - {"conv", "dense"}


def _against(found: Found) -> list[Bar]:
    times = found["milliseconds"]
    (peer,) = _peer(found)
    ratios = {form: times[form] / times[peer] for form in ("conv", "dense")}
    return [(form, ratio, f"{ratio:.2f}x") for form, ratio in ratios.items()]


def _speedups(found: Found) -> list[Bar]:
    times = found["milliseconds"]
    return [
        (name, times["original"] / ms, _times(times["original"] / ms))
        for name, ms in times.items()
        if name != "original" and "compiled" not in name
    ]


def _times(value: float) -> str:
    return f"{value:.1f}x" if value < 10 else f"{value:.0f}x"
