"""Tables in Markdown, made from the results of all devices."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FORMS = ("original", "all to conv", "all to dense", "tuned")
_FOLDED = ("original", "norms folded", "norms folded, tuned")
_NOTHING = "Not measured yet."
# Shown in the README, at batch 8.
_SHOWN = {"vgg16-8": "VGG16", "vit-b-8": "ViT-B/16", "resnet50-8": "ResNet-50"}
_WORDS = {
    "vgg16-head": "VGG16's head",
    "vgg16": "VGG16",
    "vit-b": "ViT-B/16",
    "resnet50": "ResNet-50",
    "convnext-t": "ConvNeXt-T",
    "mixer-b": "Mixer-B/16",
    "mobilenet": "MobileNet",
    "bert-base": "BERT-base",
    "vgg-fc6": "VGG16's fc6, a 7x7 window",
    "vgg-fc7": "VGG16's fc7",
    "vgg-fc8": "VGG16's fc8",
    "vit-mlp-up": "ViT-B's MLP, up",
    "vit-mlp-down": "ViT-B's MLP, down",
    "vit-patches": "ViT-B's patch embedding",
    "bert-projection": "BERT's projection",
    "loop-1000": "fori_loop of two 1x1 convolutions, 1000 channels",
    "scan-512": "scan of four 1x1 convolutions, 512 channels",
    "import": "import, after flax.linen",
    "bert-tracing": "plan and trace BERT-base",
    "convert-numpy": "convert BERT-base's params, NumPy",
    "convert-jax": "convert BERT-base's params, JAX",
    "trace-linen-bert": "linen: BERT-base",
    "trace-linen-scan": "linen: a scanned stack",
    "trace-linen-own-layers": "linen: custom layer classes",
    "trace-nnx-llama": "NNX: Llama",
    "trace-function-bert": "function: BERT-base",
    "trace-function-scan": "function: a scanned stack",
    "trace-function-plain": "function: plain matmuls",
    "trace-function-jit": "function: a jitted block, called twelve times",
    "trace-function-remat": "function: a remat block, called twelve times",
    "in-place-llama": "convert an NNX model of 631 MiB in place",
    "in-place-chw-head": "convert one CHW kernel of 98 MiB in place",
    "call-linen": "call a linen model",
    "call-nnx": "call an NNX model",
    "call-function": "call a function",
    "verify-digits-everywhere": "verify a small classifier on eight backends",
    "verify-vit-b-tpu": "verify ViT-B/16 for a TPU",
    "step-pointwise": "1x1 convolution, 64 to 256 channels, 56x56",
    "step-patchify": "16x16 patches, 3 to 384 channels, 224x224",
    "step-unpatchify-2": "transposed 2x2, stride 2, 64 to 32 channels, 32x32",
    "step-unpatchify-16": "transposed 16x16, stride 16, 192 to 3 channels, 14x14",
    "step-phases-4": "transposed 4x4, stride 2, 64 to 32 channels, 32x32",
    "step-resnet50": "ResNet-50",
    "step-vit-b": "ViT-B/16",
    "step-unet": "U-Net, half the published widths, 64x64",
    "step-mae-decoder": "MAE's decoder",
    "verify-digits": "verify a small classifier",
    "verify-vit": "verify a ViT of 4 blocks",
    "verify-bert": "verify BERT-base",
    "operators-ds-cnn": "DS-CNN",
    "operators-mobilenet-v1": "MobileNetV1",
    "operators-mobilenet-v2": "MobileNetV2",
    "operators-mobilenet-v3": "MobileNetV3",
    "operators-efficientnet-b0": "EfficientNet-B0",
    "operators-vgg16": "VGG16",
    "operators-resnet18": "ResNet-18",
    "operators-autoencoder": "convolutional autoencoder",
    "operators-mlp": "MLP of ten layers",
    "operators-bert-tiny": "BERT-tiny",
    "operators-vit": "ViT",
    "operators-mixer": "MLP-Mixer",
    "operators-convnext": "ConvNeXt",
    "operators-unet": "U-Net",
    "operators-mae-decoder": "MAE's decoder",
    "operators-encoder": "encoder layer of BERT-base",
    "operators-yolo": "detector like YOLO",
    "operators-pointnet": "PointNet",
    "operators-wavenet": "WaveNet",
    "operators-siamese": "Siamese network",
}

Found = dict[str, Any]


def read(file: Path) -> list[Found]:
    """Return the results of a device; files of other scripts have none."""
    return json.loads(file.read_text()).get("results", [])


def words(case: str, *, batch: bool = True) -> str:
    """Return a case's name in words.

    Args:
      case: The name under which ``python benchmarks`` runs the case.
      batch: Whether to name the batch size, if the case has one.

    Returns:
      The model or layer, followed by batch size, dtype and device; the case itself
      if its name is unknown.

    Example:
      >>> words("resnet-56-reduce-8-f32")
      "ResNet-50's 56x56 map, 1x1 down, batch 8, float32"
      >>> words("vit-b-8 for tpu:v5e")
      'ViT-B/16, batch 8, TPU v5e'
      >>> words("unet in ONNX")
      'U-Net in ONNX'
    """
    if network := re.fullmatch(r"(\S+) ((?:in|on) \S+)", case):
        return f"{_WORDS['operators-' + network[1]]} {network[2]}"
    name, _, device = case.partition(" for ")
    dtypes = {"f32": "float32", "bf16": "bfloat16"}
    parts = name.split("-")
    dtype = dtypes[parts.pop()] if parts[-1] in dtypes else ""
    known = "-".join(parts)
    size = ""
    if known not in _WORDS and parts[-1].isdigit():
        size = parts.pop()
        known = "-".join(parts)
    if len(parts) == 3 and parts[0] == "resnet":
        way = {"reduce": "down", "expand": "up"}[parts[2]]
        text = f"ResNet-50's {parts[1]}x{parts[1]} map, 1x1 {way}"
    elif known in _WORDS:
        text = _WORDS[known]
    else:
        return case
    if size and batch:
        text += f", {size} layers" if known.startswith("call-") else f", batch {size}"
    tpu = device.replace("tpu:", "TPU ")
    return ", ".join(part for part in (text, dtype if batch else "", tpu) if part)


def tables(folder: Path) -> dict[str, str]:
    """Return all tables by name, such as ``models-cpu`` and ``cycles``.

    A table of the CPU without results shows a note instead.
    """
    made = {f"{name}-cpu": _NOTHING for name in _TABLES} | {"cycles": _NOTHING}
    cycles = []
    for file in sorted(folder.glob("*.json")):
        results = sorted(read(file), key=_in_order)
        for name, (belongs, table) in _TABLES.items():
            if own := [found for found in results if belongs(found)]:
                made[f"{name}-{file.stem}"] = table(own)
        cycles += [found for found in results if found["group"] == "cycles"]
    if cycles:
        made["cycles"] = _cycles(cycles)
    if (file := folder / "slide.json").exists():
        results = json.loads(file.read_text())
        made["slide-cpu"] = _slide(results["slide"])
        made["slide-families"] = _families(results.get("families", []))
        made["slide-patches"] = _patches(results.get("patches", []))
        made["slide-scan"] = _scan(results["scan"]) if "scan" in results else _NOTHING
    return made


def _in_order(found: Found) -> list[tuple[bool, int, str]]:
    """Sort key: cases by name, numbers in them by size."""
    parts = re.split(r"(\d+)", found["case"])
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def readme(results: Sequence[Found]) -> str:
    """Return the README's sentence on tuning, from the results on the CPU."""
    ratios = {found["case"]: found["bounds"][0]["value"] for found in results}
    shown = [f"{ratios[c]:.2f}x on {w}" for c, w in _SHOWN.items() if c in ratios]
    return (
        f"`tune` reduces the time of a batch of 8 to {', '.join(shown)}, and of a "
        f"convolution in a loop to {ratios['loop-1000']:.1g}x; ViT-B/16 at batch 1 "
        f"stays at {ratios['vit-b-1']:.2f}x"
    )


def _models(results: Sequence[Found]) -> str:
    return _times("model, batch", results, _FORMS)


def _folded(results: Sequence[Found]) -> str:
    rows = [["model, batch", *_FOLDED, "folded / original"]]
    for found in results:
        ms = found["milliseconds"]
        ratio = f"{ms['norms folded'] / ms['original']:.2f}x"
        cells = [_time(found, name) for name in _FOLDED]
        rows.append([words(found["case"]), *cells, ratio])
    return _markdown(rows)


def _layers(results: Sequence[Found]) -> str:
    names = list(dict.fromkeys(n for found in results for n in found["milliseconds"]))
    return _times("layer, batch", results, sorted(names, key=_place))


def _training(results: Sequence[Found]) -> str:
    names = list(dict.fromkeys(n for found in results for n in found["milliseconds"]))
    rows = [["step", *names, "other form / original", "bound"]]
    for found in results:
        forward = found.get("forward", {})
        cells = []
        for name in names:
            cell = _time(found, name) if name in found["milliseconds"] else ""
            if name in forward:
                cell += f" (forward {forward[name]:,.3g} ms)"
            cells.append(cell)
        rows.append([words(found["case"]), *cells, *_bound(found["bounds"][0])])
    return _markdown(rows)


def _place(name: str) -> tuple[bool, bool, bool]:
    """Sort key: the original, the other forms, tuned, then PyTorch's."""
    return name.startswith("PyTorch"), name == "tuned", name != "original"


def _times(title: str, results: Sequence[Found], names: Sequence[str]) -> str:
    rows = [[title, *names, "tuned / original", "bounds"]]
    for found in results:
        cells = [_time(found, name) for name in names]
        first, *_ = bounds = found["bounds"]
        rows.append([words(found["case"]), *cells, _value(first), _verdict(bounds)])
    return _markdown(rows)


def _verdict(bounds: Sequence[Found]) -> str:
    """Format whether bounds hold, and those that are missed."""
    missed = [
        f"{each['what']} {_value(each)}, not {_number(each['bound'], each['unit'])}"
        for each in bounds
        if each["value"] > each["bound"]
    ]
    return f"**missed**: {'; '.join(missed)}" if missed else "hold"


def _costs(results: Sequence[Found]) -> str:
    rows = [["case", "figure", "measured", "bound"]]
    for found in results:
        for each in found["bounds"]:
            rows.append([words(found["case"]), each["what"], *_bound(each)])
    return _markdown(rows)


def _cycles(results: Sequence[Found]) -> str:
    rows = [["model", "original", "tuned", "form", "tuned / original", "bound"]]
    for found in results:
        cycles, choice = found["cycles"], found["tuning"]["choice"]
        both = [f"{cycles[name]:,.0f}" for name in ("as it is", choice)]
        rows.append([words(found["case"]), *both, choice, *_bound(found["bounds"][0])])
    return _markdown(rows)


def _operators(results: Sequence[Found]) -> str:
    rows = [["network", "file", "conv form", "dense form", "other converter", "bounds"]]
    for found in results:
        for title, forms in found["operators"].items():
            (peer,) = forms.keys() - {"conv", "dense"}
            counts = [_moves(forms[form]) for form in ("conv", "dense", peer)]
            counts[-1] += f" ({peer})"
            own = [e for e in found["bounds"] if e["what"].startswith(title)]
            rows.append([words(found["case"]), title, *counts, _verdict(own)])
    return _markdown(rows)


def _peers(results: Sequence[Found]) -> str:
    rows = [["file", "conv form", "dense form", "other converter", "bounds"]]
    for found in results:
        (peer,) = found["milliseconds"].keys() - {"conv", "dense"}
        cells = [_time(found, form) for form in ("conv", "dense", peer)]
        cells[-1] += f" ({peer})"
        own = [e for e in found["bounds"] if e["unit"] == "x"]
        rows.append([words(found["case"]), *cells, _verdict(own)])
    return _markdown(rows)


def _moves(ops: dict[str, int]) -> str:
    """Format how many operators there are, and how many of them only move entries."""
    moving = ("transpose", "reshape")
    moves = [sum(n for op, n in ops.items() if op.lower() == m) for m in moving]
    return f"{sum(ops.values())}: {moves[0]}, {moves[1]}"


def _slide(results: Sequence[Found]) -> str:
    rows = [["network", "fewer FLOPs", "speedup"]]
    for found in results:
        flops = f"{found['flops']:g}x" if found["flops"] else "not counted"
        rows.append([found["network"], flops, f"{found['times']:g}x"])
    return _markdown(rows)


def _patches(results: Sequence[Found]) -> str:
    rows = [["network", "slide", "patches in PyTorch", "speedup", "bound"]]
    for found in results:
        ms = dict(found["milliseconds"])
        own = ms.pop("slide")
        missed = "" if found["times"] >= found["bound"] else ", **missed**"
        network = f"{found['case']}, crop {found['crop']}, step {found['stride']}"
        times = [f"{each:,.0f} ms" for each in (own, min(ms.values()))]
        bound = f"{found['bound']:g}x{missed}"
        rows.append([network, *times, f"{found['times']:.2g}x", bound])
    return _markdown(rows)


def _scan(found: Found) -> str:
    side, crops = found["pixels"], found["crops"]
    rows = [
        ["figure", "measured", "bound"],
        ["peak memory of the process", f"{found['gibibytes']} GiB", "1.6 GiB"],
        ["share of the time for file access", f"{found['idle']:.0%}", "10%"],
        ["speedup over patches in PyTorch", f"{found['times']:,.0f}x", "10x"],
    ]
    few = ", on a network of few FLOPs" if found["network"] == "Patches" else ""
    whole = f"{side:,}x{side:,} pixels, {crops:,}x{crops:,} crops"
    return f"{whole} in {found['seconds']:,} s{few}.\n\n{_markdown(rows)}"


def _families(results: Sequence[Found]) -> str:
    rows = [["network", "step", "method", "fewer FLOPs", "speedup", "sharing ends at"]]
    for found in results:
        way = "shared" if found["shares"] else "a batch of crops"
        left = (found["left"] or "-").partition(":")
        part = f"`{left[0]}`:{left[2]}" if left[1] else "-"
        gain = [f"{found[key]:.2g}x" for key in ("flops", "times")]
        rows.append([found["family"], str(found["stride"]), way, *gain, part])
    return _markdown(rows)


def _time(found: Found, name: str) -> str:
    """Format a median, and half the interquartile range relative to it."""
    median = found["milliseconds"].get(name)
    if median is None:
        return "unchanged" if name == "tuned" else "-"
    text = f"{median:,.3g} ms" if median < 1000 else f"{median:,.0f} ms"
    if found.get("runs", {}).get(name, 1) > 1:
        first, third = found["quartiles"][name]
        text += f" ±{(third - first) / 2 / median:.0%}"
    return text


def _bound(each: Found) -> tuple[str, str]:
    """Format a figure and its bound, marked if missed."""
    missed = "" if each["value"] <= each["bound"] else ", **missed**"
    return _value(each), f"{_number(each['bound'], each['unit'])}{missed}"


def _number(value: float, unit: str) -> str:
    return f"{value:g}{unit if unit == 'x' else f' {unit}'}"


def _value(each: Found) -> str:
    value, unit = each["value"], each["unit"]
    if unit != "x":
        return f"{value:.3g} {unit}"
    return f"{value:.2f}x" if value >= 0.1 else f"{value:.2g}x"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _is_loop(found: Found) -> bool:
    return found["group"] == "layers" and "original" in found["milliseconds"]


# The results of each table, and how to format them.
_TABLES = {
    "models": (lambda found: found["group"] == "models", _models),
    "folded": (lambda f: "norms folded" in f.get("milliseconds", ()), _folded),
    "layers": (lambda f: f["group"] == "layers" and not _is_loop(f), _layers),
    "loops": (_is_loop, _layers),
    "costs": (lambda found: found["group"] == "costs", _costs),
    "training": (lambda found: found["group"] == "training", _training),
    "operators": (lambda found: found["group"] == "operators", _operators),
    "peers": (lambda f: f["group"] == "peers" and "milliseconds" in f, _peers),
    "chips": (lambda f: f["group"] == "peers" and "milliseconds" not in f, _costs),
}
