"""Configuration of the documentation: Sphinx with MyST, furo and two extensions of this repository."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tools"), str(HERE / "_ext")]

from polyclinic import __version__  # noqa: E402

project = "Polyclinic"
author = "The Polyclinic authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "reference"]
root_doc = "index"
exclude_patterns = ["_build", "Thumbs.db"]
toc_object_entries = False  # objects of the API would make the navigation of every page long

html_theme = "furo"
html_title = f"Polyclinic {release}"
html_static_path = ["_static"]
html_css_files = ["polyclinic.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["dollarmath", "deflist", "fieldlist", "colon_fence"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
pygments_style = "friendly"
pygments_dark_style = "github-dark"
