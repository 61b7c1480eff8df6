"""Where a recipe runs. Importing this package enters all into `recipes.DEPLOYMENTS`, and imports no engine.

A deployment of several files is a folder; its `__init__` describes it, and the files that run it are imported when
it runs.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
