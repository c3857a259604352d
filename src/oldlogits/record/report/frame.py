"""What all pages share: the frame and the parts in ``templates/``, found beside the templates of a page's own package."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

_HERE = "oldlogits.record.report"


def page_template(name: str, package: str = _HERE) -> Template:
    """A template of a package's ``templates/``, which may extend ``frame.html`` and take macros of ``parts.html``."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(_HERE)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
