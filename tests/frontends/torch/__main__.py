"""``python tests/frontends/torch`` renews the table of docs/gallery/pytorch.md."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[0] = str(Path(__file__).parents[2])

from frontends.torch.models import CASES, made  # noqa: E402

import fcconv_jax as fc  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs/gallery/pytorch.md"
MARK = "<!-- table -->\n"


def row(name: str) -> str:
    """The row of one model."""
    case = CASES[name]
    model = made(case)
    plans = [fc.make_plan(model, to=to, **case.inputs) for to in ("conv", "dense")]
    counts = " | ".join(str(len(plan)) for plan in plans)
    uses = ", ".join(
        use for use, has in (("slide", case.slide), ("export", case.export)) if has
    )
    return f"| {name} | `{type(model).__name__}` | {counts} | {uses} |"


def main() -> None:
    """Write the table."""
    text = PAGE.read_text(encoding="utf-8")
    head = text.partition(MARK)[0]
    lines = [
        "| model | class | layers to conv | layers to dense | also |",
        "| --- | --- | --- | --- | --- |",
        *map(row, CASES),
    ]
    PAGE.write_text(head + MARK + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
