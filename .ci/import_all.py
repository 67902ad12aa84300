"""Import every module of the installed package and print how many there are.

    python import_all.py FOLDER

Fails unless the package comes from below FOLDER, every module has a file of its own, and every class exists once.
"""

import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pyro_metassm

folder = Path(sys.argv[1]).resolve()
names = ["pyro_metassm"] + [
    module.name
    for module in pkgutil.walk_packages(pyro_metassm.__path__, "pyro_metassm.")
    if not module.name.endswith("__main__")
]
files: dict[Path, str] = {}
classes: dict[tuple[str, str], type] = {}
for name in names:
    module = importlib.import_module(name)
    file = Path(module.__file__ or "").resolve()
    assert file.is_relative_to(folder), f"{name} comes from {file}, not from below {folder}"
    assert file not in files, f"{name} and {files[file]} are both {file}"
    files[file] = name
    for cls in vars(module).values():
        if inspect.isclass(cls) and cls.__module__.startswith("pyro_metassm"):
            first = classes.setdefault((inspect.getsourcefile(cls) or "", cls.__qualname__), cls)
            assert cls is first, f"{cls.__qualname__} exists as {cls.__module__} and as {first.__module__}"
bare = {"models", "guides"} & set(sys.modules)
assert not bare, f"imported under a bare name: {bare}"
missing = {"pyro_metassm.models", "pyro_metassm.guides"} - set(names)
assert not missing, f"not in the package: {missing}"
print(f"{len(names)} modules, {len(classes)} classes")
