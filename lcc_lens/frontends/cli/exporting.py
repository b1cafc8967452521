"""The subcommand export: a restoration as a plain Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from lcc_lens.core.errors import RequestError
from lcc_lens.frontends.cli.options import Maybe, Out, Placement, RunPath, Switch, Tabled
from lcc_lens.frontends.cli.show import console, show_facts


@dataclass(frozen=True, kw_only=True)
class Files:
    """How the weights are written, and where else."""

    dtype: Maybe[Literal["float32", "bfloat16", "float16"]] = None
    """Round the weights to this format (the pruned model's, if not given)."""
    max_shard_size: Maybe[str] = None
    """Bytes per weight file at most, such as 5GB (the pruned model's files, if not given)."""
    for_engine: Annotated[Maybe[Literal["vllm", "sglang"]], tyro.conf.arg(name="for")] = None
    """The engine that will serve it: refused where its loader would drop a bias that holds constants."""
    push_to_hub: Maybe[str] = None
    """Upload the verified directory to this repository (owner/name), private, under your own login."""
    gguf: Maybe[Path] = None
    """Also write this file for llama.cpp, by its converter, and compare every number."""
    llama_cpp: Maybe[Path] = None
    """A clone of llama.cpp, for its converter (LCC_LENS_LLAMA_CPP, if not given)."""


@dataclass(frozen=True, kw_only=True)
class Export(Tabled):
    """Fold a restoration into a plain Hugging Face directory and verify it."""

    example: ClassVar[str] = "runs/mine out/restored"

    run: RunPath
    """The run directory with the restoration."""
    out: Out
    """The directory to write."""
    pruned: Maybe[str] = None
    """Where the pruned model lies now (where the run found it or beside the run, if not given)."""
    comparison: Maybe[Path] = None
    """The folder of a comparison of the same models, whose controls go onto the card (the run's own, if not given)."""
    overwrite: Switch = False
    """Replace an existing directory and GGUF file."""
    files: Files = Files()
    memory: Placement = field(default_factory=Placement)

    def execute(self) -> None:
        import torch

        from lcc_lens.exporters.hub import push_to_hub, require_repository
        from lcc_lens.exporters.huggingface import export
        from lcc_lens.models.loading.recorded import recorded_model
        from lcc_lens.restoration.result import Restoration

        if self.files.push_to_hub is not None:
            require_repository(self.files.push_to_hub)
        self._require_gguf()
        restoration = Restoration.load(self.run)
        record = restoration.record
        pruned = self.pruned or recorded_model(record.pruned, record.pruned_sha256, self.run)
        dtype = None if self.files.dtype is None else getattr(torch, self.files.dtype)
        report = export(
            restoration, pruned, self.out, run=self.run, comparison=self.comparison,
            for_engine=self.files.for_engine, dtype=dtype, max_shard_size=self.files.max_shard_size,
            overwrite=self.overwrite,
        )  # fmt: skip
        show_facts(f"exported and verified: {self.out}", report)
        self.write(report.table)
        if self.files.gguf is not None:
            self._write_gguf(self.files.gguf)
        if self.files.push_to_hub is not None:
            console().print(push_to_hub(self.out, self.files.push_to_hub), soft_wrap=True)

    def _require_gguf(self) -> None:
        """Check that the GGUF file can be written, before exporting."""
        from lcc_lens.exporters.gguf import require_converter, require_new_file

        if self.files.gguf is not None:
            require_converter(self.files.llama_cpp)
            require_new_file(self.files.gguf, overwrite=self.overwrite)
        elif self.files.llama_cpp is not None:
            raise RequestError("expected the GGUF file to write beside --llama-cpp, got none; name it by --gguf FILE")

    def _write_gguf(self, file: Path) -> None:
        from lcc_lens.exporters.gguf import export_gguf

        report = export_gguf(self.out, file, llama_cpp=self.files.llama_cpp, overwrite=self.overwrite)
        show_facts(f"for llama.cpp: {file}", report)
