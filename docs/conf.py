"""Sphinx configuration; build with `python -m sphinx -W docs docs/_build/html`."""

import os
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
# Cells and notebooks run this checkout, on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
sys.path.insert(0, str(HERE.parent))
# Cells that call `fcconv` or `python` get those of this environment, uncoloured.
os.environ["PATH"] = os.pathsep.join(
    [str(Path(sys.executable).parent), os.environ["PATH"]]
)
os.environ |= {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100", "PY_COLORS": "0"}
os.environ["FCCONV_RESULTS"] = str(HERE.parent / "benchmarks" / "results")

_metadata = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
project = _metadata["name"]
author = "the fcconv-jax authors"
project_copyright = author
version = release = _metadata["version"]
summary = _metadata["description"]

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.githubpages",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "generated_pages",
    "docstrings",
    "llms",
    "run_tabs",
]
exclude_patterns = ["_build", "_ext", "_generated", "**.ipynb_checkpoints"]
nitpicky = False

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
autosummary_generate = True
autosummary_imported_members = True
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]
templates_path = ["_templates"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
# Every cell runs. A failing cell is a warning with its traceback; -W makes it an error.
nb_execution_mode = "force"
nb_execution_raise_on_error = False
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_execution_in_temp = True
nb_output_stderr = "remove"  # progress
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "fcconv_jax"
html_baseurl = _metadata["urls"]["Documentation"]
html_static_path = ["_static", "_generated/static"]
html_css_files = ["site.css"]
html_theme_options = {
    "repository_url": _metadata["urls"]["Repository"],
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_edit_page_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],
}
html_context = {"default_mode": "auto"}
html_copy_source = True
html_show_sphinx = False
