"""Where a recipe runs. Importing this package enters all into `recipes.DEPLOYMENTS`, and imports no engine."""

import importlib
import pkgutil

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
