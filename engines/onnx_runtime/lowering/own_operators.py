"""The domain of ONNX Runtime's own operators."""

import onnx
from onnx import helper

DOMAIN = "com.microsoft"


def import_domain(model: onnx.ModelProto) -> None:
    """Let a model use the domain's operators."""
    if all(each.domain != DOMAIN for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
