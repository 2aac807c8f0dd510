"""How the site of these pages is built: `make docs`; a warning is an error."""

project = "halve"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "halve"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
