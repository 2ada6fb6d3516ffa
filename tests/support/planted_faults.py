"""Faults of exporters and engines, planted into copies of a bundle."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from spike_export.artifacts.manifest import DATA_FILE, GRAPH_FILE

Fault = Callable[[onnx.GraphProto], None]


def planted(bundle: Path, folder: Path, fault: Fault) -> Path:
    """Return a copy of a bundle whose graph has a fault."""
    shutil.copytree(bundle, folder)
    model = onnx.load(folder / GRAPH_FILE)
    fault(model.graph)
    (folder / DATA_FILE).unlink()
    onnx.save_model(model, folder / GRAPH_FILE, save_as_external_data=True, location=DATA_FILE, size_threshold=256)
    return folder


def changed(name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Fault:
    """Return a fault in one constant."""
    return replaced({name: lambda constants: change(constants[name])})


def swapped(one: str, other: str) -> Fault:
    """Return the fault that two constants have each other's value."""
    return replaced({one: lambda constants: constants[other], other: lambda constants: constants[one]})


def replaced(changes: Mapping[str, Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]]]) -> Fault:
    """Return a fault in constants, each computed from all the sound ones."""

    def fault(graph: onnx.GraphProto) -> None:
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        for tensor in graph.initializer:
            if tensor.name in changes:
                values = np.ascontiguousarray(changes[tensor.name](constants), constants[tensor.name].dtype)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return fault


def later_positions(graph: onnx.GraphProto) -> None:
    """Let the tokens behind the prefix have the positions of their successors."""
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "one_later"))
    place, node = next((i, node) for i, node in enumerate(graph.node) if node.name == "model.context.positions")
    output = node.output[0]
    node.output[0] = "sound_positions"
    graph.node.insert(place + 1, helper.make_node("Add", ["sound_positions", "one_later"], [output], name="later"))
