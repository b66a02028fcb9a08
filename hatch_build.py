"""Generates the gRPC stubs from proto/ into resilver/v1 whenever the package is built or installed."""

from __future__ import annotations

import importlib.resources
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface):  # type: ignore[type-arg]  # hatchling's generic is not exported
    """Runs protoc with the message, service and type plugins."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Writes resilver/v1/*_pb2.py, *_pb2_grpc.py and their .pyi files; stops the build if protoc fails."""
        del version, build_data
        from grpc_tools import protoc  # noqa: PLC0415  # a build requirement, absent at run time

        root = Path(self.root)
        files = sorted(str(path) for path in (root / "proto").rglob("*.proto"))
        well_known = importlib.resources.files("grpc_tools") / "_proto"
        # The plugins stand beside the interpreter of the isolated build environment, which may not be on PATH.
        bin_dir = Path(sys.executable).parent
        arguments = [
            "protoc",
            f"--proto_path={root / 'proto'}",
            f"--proto_path={well_known}",
            f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
            f"--python_out={root}",
            f"--grpc_python_out={root}",
            f"--mypy_out=quiet:{root}",
            f"--mypy_grpc_out=quiet,only_async:{root}",
            *files,
        ]
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc failed; the message above names the file and line")
