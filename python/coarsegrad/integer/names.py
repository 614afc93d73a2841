"""What reports call the nodes of an exported graph."""

from __future__ import annotations

from torch.fx import Node

from .flow import LAYERS
from .moves import is_move, target
from .trained import PARAMETRIZED


def weight_name(node: Node) -> str | None:
    """The module whose weight a layer's node reads."""
    weight = node.args[1] if node.target in LAYERS else None
    if isinstance(weight, Node) and weight.op == "get_attr":
        for suffix in (PARAMETRIZED, ".weight"):
            if f".{target(weight)}".endswith(suffix):
                return f".{target(weight)}".removesuffix(suffix)[1:]
    return None


def name_of(node: Node) -> str:
    """The module that a node is of, by its weight's name where it has one."""
    if (name := weight_name(node)) is not None:
        return name
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else node.name


def source(node: Node) -> Node:
    """Where the values of a node come from, before moves."""
    while is_move(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def op_name(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", str(packet))


def described(node: Node) -> str:
    if node.op in ("placeholder", "output"):
        return "an input of the model" if node.op == "placeholder" else "the output of the model"
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    kind = str(stack[-1][1]).rpartition(".")[2].rstrip("'>").removeprefix("Parametrized") if stack else ""
    return f"{op_name(node)} of {kind}" if kind else op_name(node)
