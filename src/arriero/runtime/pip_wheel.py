"""Where is a wheel of pip, for an environment that has none?"""

import sys
import sysconfig
from pathlib import Path


def find() -> Path | None:
    """Return the wheel that another arriero left where it installed us, else that of this machine's Python.

    None if there is none.  A wheel of pip runs as it is, from its file.
    """
    carried = Path(sys.prefix).resolve().parent.parent / "carried"
    bundles = [
        sysconfig.get_config_var("WHEEL_PKG_DIR"),
        Path(sysconfig.get_path("stdlib")) / "ensurepip/_bundled",
    ]
    places = [carried, *(Path(place) for place in bundles if place)]
    return next((path for place in places for path in sorted(place.glob("pip-*.whl"))), None)
