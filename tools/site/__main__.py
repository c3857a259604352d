"""Build the site, or print one of its written pages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tools.site.error_texts import ROOT
from tools.site.pages import PAGES
from tools.site.stage import STYLE, navigation, stage

CONFIG = """\
site_name: oldlogits
site_description: Asynchronous reinforcement learning of LLM agents that never loses the old logits.
docs_dir: {pages}
site_dir: {site}
use_directory_urls: false
strict: true
theme: {{name: readthedocs, highlightjs: false, navigation_depth: 2, include_homepage_in_sidebar: false}}
plugins: [search]
extra_css: [{css}]
markdown_extensions:
  - tables
  - sane_lists
  - toc: {{permalink: true, slugify: !!python/name:tools.site.stage.slug ""}}
validation:
  nav: {{omitted_files: warn, not_found: warn, absolute_links: warn}}
  links: {{not_found: warn, absolute_links: warn, unrecognized_links: warn, anchors: warn}}
nav: {nav}
"""


def build(folder: Path) -> int:
    """Write the pages and the builder's recipe into a folder, and run it; any warning fails."""
    pages = folder / "pages"
    nav = navigation(stage(pages))
    config = folder / "properdocs.yml"
    folders = {"pages": json.dumps(str(pages)), "site": json.dumps(str(folder / "site"))}
    config.write_text(CONFIG.format(**folders, css=STYLE, nav=json.dumps(nav)), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "properdocs", "build", "--strict", "--config-file", config], cwd=ROOT
    ).returncode


def main(words: list[str]) -> int | str | None:
    """Do what the words after the command ask for; returns the exit status."""
    match words:
        case []:
            return build(ROOT / "build")
        case ["page", name] if name in PAGES:
            print(PAGES[name]())
            return 0
        case ["into", folder]:
            return build(Path(folder).resolve())
        case _:
            return __doc__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
