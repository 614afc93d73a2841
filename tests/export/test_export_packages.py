"""torch.export's files, and packages of AOTInductor in a C++ program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension
from torch import nn

import coarsegrad as cg

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")


@pytest.fixture(scope="module")
def models():
    """The float model and the integer one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), cg.QReLU(2), nn.Linear(16, 4)).eval()
    return model, cg.convert(model, (torch.randn(3, 8),))


@pytest.mark.parametrize("integers", [False, True])
def test_export_saved_and_loaded(models, integers, tmp_path):
    model, x = models[integers], torch.randn(5, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(loaded(x[:2]), model(x[:2]))


def _compiled(folder):
    """The program of loader.cpp."""
    include, lib = torch.utils.cpp_extension.include_paths(), torch.utils.cpp_extension.TORCH_LIB_PATH
    python = sysconfig.get_config_var("LIBDIR")
    program, source = folder / "loader", Path(__file__).parent / "loader.cpp"
    command = ["g++", "-std=c++20", str(source), "-o", str(program), f"-I{sysconfig.get_paths()['include']}"]
    command += [f"-I{path}" for path in include]
    for path in (lib, python):
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", f"-lpython{sysconfig.get_python_version()}"]
    subprocess.run([*command, *libraries], check=True)
    return program


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(not sysconfig.get_config_var("Py_ENABLE_SHARED"), reason="needs a Python that is a shared library")
def test_a_cpp_program_runs_packages_of_aotinductor(models, tmp_path):
    """Of the float model alone, and of the integer one with the extension."""
    program = _compiled(tmp_path)
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # what this Python finds
    for model, name, registered in ((models[0], "float", []), (models[1], "integer", ["ops"])):
        package = str(tmp_path / f"{name}.pt2")
        exported = torch.export.export(model, (torch.ones(3, 8),))
        torch._inductor.aoti_compile_and_package(exported, package_path=package)
        shown = subprocess.run(
            [program, package, *registered], env=found, check=True, capture_output=True, text=True
        ).stdout
        got = [[float(number) for number in line.split()] for line in shown.splitlines()[:3]]
        torch.testing.assert_close(torch.tensor(got), model(torch.ones(3, 8)), rtol=0, atol=1e-4)
