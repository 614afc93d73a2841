"""Whole models that are packed, and that nothing which packing keeps outlives its use."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref

import oracle
import pytest
import torch
from packing_cases import assert_same, build, gradients, kept_bytes, mlp
from torch import nn

import coarsegrad as cg

pytestmark = pytest.mark.usefixtures("reference_or_native")


def test_pack_activations_():
    model, x = build("opt", ste="relu")
    want = gradients(model, x)
    parameters = [*model.parameters(), *model.buffers()]
    plain, _ = kept_bytes(lambda: model(x), x, *parameters)
    keys = list(model.state_dict())
    handle = cg.pack_activations_(model)
    packed, _ = kept_bytes(lambda: model(x), x, *parameters)
    assert packed < plain
    assert_same(gradients(model, x), want)
    assert list(model.state_dict()) == keys
    handle.remove()
    assert kept_bytes(lambda: model(x), x, *parameters)[0] == plain
    with cg.pack_activations_(model):
        assert kept_bytes(lambda: model(x), x, *parameters)[0] == packed
    assert kept_bytes(lambda: model(x), x, *parameters)[0] == plain


def test_copies_of_a_packed_model_are_packed_models_of_their_own():
    model, x = build("mlp", ste="relu")
    want = gradients(model, x)
    cg.pack_activations_(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            model[0].weight.zero_()
        assert_same(gradients(twin, x), want)
        with torch.no_grad():
            model[0].weight.copy_(twin[0].weight)


def test_a_forward_that_fails_leaves_no_block_open():
    class Failing(nn.Module):
        def forward(self, x):
            raise KeyError("on purpose")

    def refuse(module, args):
        raise KeyError("before")

    top = torch._C._autograd._top_saved_tensors_default_hooks
    model = nn.Sequential(cg.QReLU(2), Failing())
    cg.pack_activations_(model)
    for _ in range(2):
        with pytest.raises(KeyError, match="on purpose"):
            model(torch.randn(4, requires_grad=True))
        assert top(False) is None
    # A hook that fails before the block is open must not close another's.
    inner = nn.Sequential(cg.QReLU(2))
    cg.pack_activations_(inner)
    inner.register_forward_pre_hook(refuse, prepend=True)
    outer_top = []

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            before = top(False)
            with pytest.raises(KeyError, match="before"):
                self.inner(x)
            outer_top.append(before is not None and top(False) == before)
            return x

    outer = Outer()
    cg.pack_activations_(outer)
    outer(torch.randn(4))
    assert outer_top == [True] and top(False) is None
    with pytest.raises(KeyError), cg.packed_activations():
        raise KeyError
    assert top(False) is None


def test_pack_activations_wants_a_module():
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        cg.pack_activations_(mlp)


# ----------------------------------------------------------------------------------------------- leaks


def alive(refs):
    gc.collect()
    return [ref for ref in refs if ref() is not None]


@pytest.mark.parametrize("ste", oracle.STES)
@pytest.mark.parametrize("around", [False, True])
def test_nothing_survives(ste, around):
    """No output and no note outlives the graph, with no help of the cycle collector."""
    refs, reachable = [], gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        model, x = build("mlp", ste=ste)

        def pack(t):
            if t.dtype != torch.uint8:
                return t.detach()
            refs.append(weakref.ref(t.untyped_storage()))
            return t  # as it is: whoever keeps it must not be what it leads to

        outer = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)

        def watch(module, args, output):
            storage = output.untyped_storage()
            refs.append(weakref.ref(storage))
            record = storage.__dict__.get("_coarsegrad_record")
            if record is not None:
                refs.extend(map(weakref.ref, (record, *record._sources, record._decoder)))

        for module in model.modules():
            module.register_forward_hook(watch)
        with outer if around else contextlib.nullcontext(), cg.packed_activations():
            loss = model(x).square().sum()
        assert len(refs) > len(list(model.modules()))
        loss.backward()
        del loss
        assert [ref for ref in refs if ref() is not None] == []
        # Without a backward, and where an output is kept by nobody.
        refs.clear()
        model[2].requires_grad_(False)
        with outer if around else contextlib.nullcontext(), cg.packed_activations():
            model(x)
        assert [ref for ref in refs if ref() is not None] == []
    finally:
        if reachable:
            gc.enable()


def test_an_output_that_its_own_node_keeps_does_not_survive():
    x = torch.randn(8, requires_grad=True)
    with cg.packed_activations():
        y = x.exp()
    ref = weakref.ref(y.untyped_storage())
    gc.disable()
    try:
        del y
        assert ref() is None
    finally:
        gc.enable()


def test_codes_of_an_output_that_nobody_keeps_die_with_it():
    x, alpha = torch.randn(64, requires_grad=True), torch.tensor([0.3])
    with cg.packed_activations():
        y = cg.qrelu(x, alpha, 2)
        codes = weakref.ref(y.untyped_storage()._coarsegrad_record._sources[0])
        z = y + 1
        assert codes() is not None
        del y
        assert codes() is None
    z.sum().backward()


def test_the_backward_lets_go_of_what_was_kept():
    """Once used, though the graph itself is still there."""
    model, x = build("mlp", ste="relu")
    refs = []

    def pack(t):
        refs.append(weakref.ref(t.untyped_storage())) if t.dtype == torch.uint8 else None
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), cg.packed_activations():
        loss = model(x).square().sum()
    assert len({ref() for ref in alive(refs)}) == 2
    loss.backward()
    assert alive(refs) == []
    assert loss.grad_fn is not None
