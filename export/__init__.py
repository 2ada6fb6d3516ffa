"""Export: from a checkpoint and a recipe to an ONNX bundle."""

import inspect
import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    # This folder and the function of the public interface share the name `spike_export.export`, and importing any file
    # of the folder binds that name to the folder. So the folder itself can be called; it forwards to the function.
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from spike_export.export.model_export import export

        return export(*arguments, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        from spike_export.export.model_export import export

        return inspect.signature(export)


sys.modules[__name__].__class__ = _CallableModule
