"""The techniques: importing this package imports each of its modules, and so enters all into `recipes.TECHNIQUES`."""

import importlib
import pkgutil

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
