"""Trains a digit classifier, exports it to int8 LiteRT and verifies the files.

Trains the classifier of ``digits.py``, exports it to a LiteRT file in the form that an
Ethos-U prefers, verifies the file, then quantizes it to int8 and compares accuracies.

    python examples/edge_digits.py --help
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from digits import Digits, load_data, train

import fcconv_jax as fc
from fcconv_jax.export.runtimes.litert import LiteRTFile, run


def accuracy(content: bytes, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the percentage of images that a LiteRT file classifies correctly."""
    found = [int(run(content, [image[None]])[0].argmax()) for image in images]
    return 100.0 * float(np.mean(np.array(found) == labels))


def draw(path: Path, files: dict[str, LiteRTFile]) -> None:
    """Draw the operators of each file as a column of boxes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = {
        title: [
            (
                file.name(op),
                "x".join(map(str, file.graph.tensors[op.outputs[0]].shape)),
            )
            for op in file.graph.operators
        ]
        for title, file in files.items()
    }
    rows = max(map(len, columns.values()))
    figure, axes = plt.subplots(figsize=(3.4 * len(columns), 0.7 * rows + 1))
    for x, (title, boxes) in enumerate(columns.items()):
        axes.text(x, 0.4, title, ha="center", weight="bold")
        for y, (name, shape) in enumerate(boxes):
            colour = {"CONV_2D": "#cfe3f7", "FULLY_CONNECTED": "#f9dcc4"}.get(name)
            style = {"boxstyle": "round", "fc": colour or "#eeeeee", "ec": "#888888"}
            axes.text(
                *(x, -y - 0.4, f"{name}\n{shape}"),
                ha="center",
                va="center",
                fontsize=8,
                bbox=style,
            )
    axes.set(xlim=(-0.6, len(columns) - 0.4), ylim=(-rows - 0.2, 0.8))
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", dpi=120)
    plt.close(figure)


def main(arguments: Any = None) -> None:
    parser = argparse.ArgumentParser(description="Digits for an edge device.")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--chip", default="ethos-u55", help="see docs/howto/export.md")
    parser.add_argument("--out", type=Path, default=Path("edge_digits"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    x, y, test_x, test_y = load_data()
    print(f"training on {len(x)} digits")
    params = {"params": train(x, y, options.epochs).params}

    contents, files = {}, {}
    for form in ("dense", "conv", "mix"):
        path = options.out / f"{form}.tflite"
        report = fc.export(
            *(Digits(), params, x[:1]),
            path=path,
            to=form,
            chip=options.chip,
        )
        if not report.passed:
            raise SystemExit(str(report))
        contents[form], files[form] = path.read_bytes(), LiteRTFile(path)
    print(report)

    quantized = options.out / "int8.tflite"
    report = fc.export(
        *(Digits(), params, x[:1]),
        path=quantized,
        to="mix",
        chip=options.chip,
        calibrate=[x[:256]],
        compare=True,
    )
    print(report)
    if not report.passed:
        raise SystemExit("the int8 file differs from the trained model")
    for name, content in (*contents.items(), ("int8", quantized.read_bytes())):
        right = accuracy(content, test_x, test_y)
        print(f"{name:5}  {len(content) / 1024:6.1f} KiB  {right:.1f} % correct")
    draw(options.out / "graph.png", {form: files[form] for form in ("dense", "conv")})
    print(f"wrote {options.out}/graph.png")


if __name__ == "__main__":
    main()
