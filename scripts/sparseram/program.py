# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs whose names cannot be imported, as modules."""

import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType


def load_program(path: str) -> ModuleType:
    """A Python program as a module; its main() is not run.

    Leaves nothing next to the program.
    """
    name = os.path.basename(path).replace('-', '_')
    loader = importlib.machinery.SourceFileLoader(name, path)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module      # for dataclasses
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    return module
