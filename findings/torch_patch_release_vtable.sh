#!/usr/bin/env bash
# torch 2.9.0 and 2.9.1: a patch release that changes the layout of a class in the headers. Guess before the run: headers of
# a patch release differ by the number of the version alone, so that an extension built for one fits the other.
# Seen: at::CUDAHooksInterface has two more virtual functions in 2.9.1, in front of others: an extension that was built with
# 2.9.0 and asks at::Context for the version of the CUDA runtime would call another function.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
for version in 2.9.0 2.9.1; do
  "$folder/venv/bin/python" -m pip download --quiet --no-deps --only-binary :all: --dest "$folder" "torch==$version"
done
"$folder/venv/bin/python" - "$folder" <<'PY'
import re
import sys
import zipfile
from pathlib import Path

HEADER = "torch/include/ATen/detail/CUDAHooksInterface.h"
virtuals = {}
for wheel in sorted(Path(sys.argv[1]).glob("torch-2.9.?-*.whl")):
    text = zipfile.ZipFile(wheel).read(HEADER).decode()
    virtuals[wheel.name[6:11]] = re.findall(r"virtual [^(]*?~?(\w+)\(", text)
old, new = virtuals["2.9.0"], virtuals["2.9.1"]
added = [name for name in new if name not in old]
behind = new[new.index(added[-1]) + 1 :]
print(f"new: {added}; behind them: {behind[:3]} and {len(behind) - 3} more")
assert added == ["versionRuntimeCuDNN", "versionCuDNNFrontend"]
assert behind and [name for name in new if name not in added] == old
PY
