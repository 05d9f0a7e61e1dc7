"""The documentation site: `make docs`. Its source folder is the repository, so that links work here as they do in the source tree."""

import tomllib
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = _PROJECT["name"]
release = _PROJECT["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md"]
# Folders that hold no page, so that they are not searched.
exclude_patterns = [".*", "benchmarks", "build", "dct_compile", "examples", "models", "passes", "runs", "tests", "triton_kernels"]
source_suffix = {".md": "markdown"}

myst_heading_anchors = 4
highlight_language = "none"
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "description"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_additional_pages = {"index": "to-docs.html"}
templates_path = ["templates"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
