"""Other tools that make 4-bit ONNX models, each in a virtual environment of its own.

    python benchmarks/others.py CALL MODEL IDS OUTPUT      as the other benchmarks do; CALL is a `Call` in JSON

The environments lie in the cache, folder rivals/, and are made when they are first needed: those with torch
take 1.4 GB and some minutes each, NNCF's less. The functions at the end are what runs inside them. IDS is a
.npy file of the token ids (samples, length) to calibrate on.

What each tool is given, beyond its defaults, so that it does as well as it can:

* onnxruntime's MatMulNBitsQuantizer: zero points. Its default method alone makes 4-bit tables (GatherBlockQuantized);
  where `gather` is asked for, that method does the table after another one has done the layers.
* NVIDIA ModelOpt: opset 21, which INT4 needs. `enable_fast_path_using_high_sysram`: the model runs once over each
  window and the inputs of all MatMuls are kept in memory. Without it the model runs over all windows again for every
  MatMul, 210 times on SmolLM2; `awqlite_run_per_subgraph` does so for every group, 120 times, and cannot be put
  together with the fast path. `awqlite_fuse_nodes=False`: the default ends in an AttributeError (`numpy.ndarray` has no
  `get`) where there is no cupy, that is, on a machine without CUDA. So each layer gets a Mul. awq_clip has no fast
  path, but looks at 64 tokens however many it is given: two windows do.
* onnxruntime-genai's builder makes a graph of its own, from weights that are taken out of the model here: attention and
  norms in fused nodes, and one table for lm_head and embedding. It quantises with onnxruntime's code.
* NNCF: `awq` and `scale_estimation`; opset 21. Below that it writes MatMulNBits with zero points that are not packed,
  which onnxruntime refuses to load.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import other_text
from numpy.typing import NDArray

LM_HEAD, EMBEDDING = "/lm_head/MatMul", "/model/embed_tokens/Gather"
INT4_OPSET = 21
INT4_TOOLS = ("modelopt", "nncf")  # which need it


@dataclass(frozen=True)
class Environment:
    """packages: as pip takes them, the tool first. warm_up: Python that the first run would spend time on."""

    packages: tuple[str, ...]
    warm_up: str = ""


ENVIRONMENTS: Mapping[str, Environment] = {
    "onnxruntime": Environment(
        (
            "onnxruntime==1.32.0",
            "torch==2.13.0",  # for HQQ
            "numpy==2.4.6",
            "onnx==1.21.0",
            "onnx-ir==1.1.0",
            "ml_dtypes==0.6.0",
        )
    ),
    # What ModelOpt's extra "onnx" asks for, without cupy, and onnxruntime in the place of onnxruntime-gpu.
    "modelopt": Environment(
        (
            "nvidia-modelopt==0.47.0",
            "torch==2.13.0",
            "numpy==2.4.6",
            "scipy==1.17.1",
            "onnx==1.21.0",
            "onnxruntime==1.24.2",
            "onnx-graphsurgeon==0.6.1",
            "onnxconverter-common==1.16.0",
            "onnxscript==0.7.2",
            "onnxslim==0.1.98",
            "ml_dtypes==0.6.0",
            "lief==1.0.0",
            "cppimport==26.4.17",
        ),
        "import modelopt.onnx.quantization.extensions",  # compiles its C++ part
    ),
    "genai": Environment(
        (
            "onnxruntime-genai==0.14.1",
            "onnxruntime==1.32.0",
            "torch==2.13.0",
            "transformers==4.57.6",
            "safetensors==0.8.0",
            "numpy==2.4.6",
            "onnx==1.21.0",
            "onnx-ir==1.1.0",
            "ml_dtypes==0.6.0",
        )
    ),
    "nncf": Environment(("nncf==3.4.0", "numpy==2.4.6", "onnx==1.21.0", "onnxruntime==1.32.0")),
}


@dataclass(frozen=True)
class Call:
    """tool: a key of ENVIRONMENTS and of `TOOLS`; settings: arguments of its function there, as JSON has them."""

    tool: str
    settings: Mapping[str, Any]

    @property
    def version(self) -> str:
        return ENVIRONMENTS[self.tool].packages[0]

    def key(self) -> str:
        """What tells this call from every other, versions included."""
        return json.dumps([ENVIRONMENTS[self.tool].packages, asdict(self)], sort_keys=True)

    def command(self, model: Path, ids: Path, output: Path) -> list[str]:
        """To run as a process; makes the environment if it is not there."""
        inside = [str(Path(__file__).resolve()), json.dumps(asdict(self)), str(model), str(ids), str(output)]
        return [str(python_of(self.tool)), *inside]


def cache_folder(name: str) -> Path:
    root = os.environ.get("AWQ_ONNX_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "awq-onnx") / name


def python_of(tool: str) -> Path:
    """The interpreter of a tool's virtual environment, made if it is not there as `ENVIRONMENTS` wants it."""
    folder, wanted = cache_folder("rivals") / tool, ENVIRONMENTS[tool]
    python, complete, packages = folder / "bin" / "python", folder / "packages.txt", "\n".join(wanted.packages)
    if not complete.exists() or complete.read_text() != packages:
        print(f"Making {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted.packages]
        subprocess.run(install, check=True)
        subprocess.run([str(python), "-c", wanted.warm_up], check=True)
        complete.write_text(packages)
    return python


def last_line(log: Path) -> str:
    """What a tool that failed said at the end."""
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing printed")


def calibration_ids(model: Path, samples: int, length: int, text: str | None = None) -> NDArray[np.int64]:
    """Token ids (samples, length) of a text, evenly spread over it; numpy's documentation where none is given."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.with_name("tokenizer.json")))
    ids = tokenizer.encode(text or other_text(), add_special_tokens=False).ids
    if samples * length > len(ids):
        sys.exit(f"the text has {len(ids)} tokens, {samples} windows of {length} overlap: take fewer or shorter ones")
    starts = np.linspace(0, len(ids) - length, samples).astype(int)
    return np.array([ids[start : start + length] for start in starts], np.int64)


def at_opset_21(model: Path, output: Path) -> Path:
    """A copy that may hold INT4. Between 18 and 21 no operator of the model changed, types were added."""
    copy = onnx.load(model)
    versions = {one.domain: one for one in copy.opset_import}
    assert versions[""].version >= 18, "an older model needs onnx.version_converter"
    versions[""].version = max(INT4_OPSET, versions[""].version)
    onnx.save(copy, output)
    return output


def with_own_head(model: Path, output: Path) -> Path:
    """A copy whose lm_head has a weight of its own, where it read the table of the embedding through a Transpose."""
    copy = onnx.load(model)
    graph = copy.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    (head,) = (node for node in graph.node if node.name == LM_HEAD)
    (turned,) = (node for node in graph.node if node.output[0] == head.input[1] and node.op_type == "Transpose")
    table = onnx.numpy_helper.to_array(weights[turned.input[0]])
    graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(table.T), turned.output[0]))
    graph.node.remove(turned)
    onnx.save(copy, output)
    return output


def inputs_of(graph: onnx.GraphProto, ids: NDArray[np.int64]) -> list[dict[str, NDArray[np.generic]]]:
    """One dict of all inputs for each of the sequences (B, T), the key/value cache empty."""
    caches = {
        one.name: np.zeros((1, heads.dim_value, 0, size.dim_value), np.float32)
        for one in graph.input
        if one.name.startswith("past")
        for _, heads, _, size in [one.type.tensor_type.shape.dim]
    }
    mask, positions = np.ones((1, ids.shape[1]), np.int64), np.arange(ids.shape[1])[None]
    return [{"input_ids": one[None], "attention_mask": mask, "position_ids": positions, **caches} for one in ids]


# What the interpreters of the tools run: from the model and the token ids to the quantised model.


def run_onnxruntime(
    model: Path,
    ids: NDArray[np.int64],
    *,
    method: str,
    block_size: int,
    windows: int | None = None,
    whole: bool = False,
    gather: int = 0,
    eight_bits: Collection[str] = (),
) -> onnx.ModelProto:
    """gather: block size of the embedding, 0 to leave it. eight_bits: of k_quant, layers by name. windows: to calibrate
    on, where not all.
    """
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    source, kept = onnx.load(model), [] if whole else [LM_HEAD]
    own: dict[str, Any] = {name: {"bits": 8} for name in eight_bits}
    config = {
        "rtn": lambda: nbits.DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=False),
        "hqq": lambda: nbits.HQQWeightOnlyQuantConfig(block_size=block_size),
        "k_quant": lambda: nbits.KQuantWeightOnlyQuantConfig(customized_weight_config=own),
        "gptq": lambda: nbits.GPTQWeightOnlyQuantConfig(calibration_data_reader=inputs_of(source.graph, ids[:windows])),
    }[method]()
    made = _nbits(nbits, source, config, block_size, kept)
    if not gather:
        return made
    tables = nbits.DefaultWeightOnlyQuantConfig(block_size=gather, is_symmetric=False, op_types_to_quantize=("Gather",))
    return _nbits(nbits, made, tables, gather, [])


def _nbits(nbits: Any, model: onnx.ModelProto, config: Any, block_size: int, kept: Sequence[str]) -> onnx.ModelProto:
    quantizer = nbits.MatMulNBitsQuantizer(
        model, block_size=block_size, is_symmetric=False, nodes_to_exclude=list(kept), algo_config=config
    )
    quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    return made


def run_modelopt(
    model: Path,
    ids: NDArray[np.int64],
    *,
    method: str,
    block_size: int,
    zero_points: bool = False,
    windows: int | None = None,
    gather: int = 0,
    whole: bool = False,
) -> onnx.ModelProto:
    """gather: block size of the embedding, 0 to leave it. windows: to calibrate on, where not all."""
    from modelopt.onnx.quantization.int4 import quantize  # type: ignore[import-not-found]

    source = onnx.load(model)
    lite = {"enable_fast_path_using_high_sysram": True, "awqlite_fuse_nodes": False}
    tables = {"gather_quantize_axis": 1, "gather_block_size": gather}
    made: onnx.ModelProto = quantize(
        source,
        calibration_method=method,
        calibration_data_reader=inputs_of(source.graph, ids[:windows]),
        calibration_eps=["cpu"],
        block_size=block_size,
        use_zero_point=zero_points,
        nodes_to_exclude=[] if whole else ["/lm_head"],
        **(lite if method in ("awq_lite", "awq_full") else {}),
        **(tables if gather else {}),
    )
    return made


def run_nncf(
    model: Path,
    ids: NDArray[np.int64],
    *,
    mode: str = "INT4_ASYM",
    block_size: int = -1,
    ratio: float | None = None,
    whole: bool = False,
    all_layers: bool | None = None,
    aware: bool = True,
) -> onnx.ModelProto:
    """ratio: of the layers that get 4 bits. aware: of the data, which the modes of 8 bits are not."""
    import nncf  # type: ignore[import-not-found]

    source = onnx.load(model)
    settings: dict[str, Any] = {"group_size": block_size, "ratio": ratio, "all_layers": all_layers}
    if aware:
        settings |= {"dataset": nncf.Dataset(inputs_of(source.graph, ids)), "awq": True, "scale_estimation": True}
    made: onnx.ModelProto = nncf.compress_weights(
        source,
        mode=nncf.CompressWeightsMode[mode],
        ignored_scope=nncf.IgnoredScope(names=[] if whole else [LM_HEAD, EMBEDDING]),
        **settings,
    )
    return made


def run_genai(model: Path, ids: NDArray[np.int64], *, method: str, block_size: int) -> onnx.ModelProto:
    """The whole model, built from the weights of `model` beside its config.json."""
    del ids  # it calibrates nothing
    with tempfile.TemporaryDirectory() as name:
        checkpoint, built = Path(name) / "checkpoint", Path(name) / "built"
        checkpoint_of(model, checkpoint)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "--input", str(checkpoint)]
        command += ["--output", str(built), "--cache_dir", str(Path(name) / "cache")]
        command += ["--precision", "int4", "--execution_provider", "cpu", "--extra_options", "int4_is_symmetric=false"]
        command += [f"int4_algo_config={method}", f"int4_block_size={block_size}"]
        if subprocess.run(command, check=False).returncode:
            sys.exit(1)  # it has said why
        return onnx.load(built / "model.onnx")


def checkpoint_of(model: Path, folder: Path) -> None:
    """What transformers loads, from an export by optimum."""
    from safetensors.numpy import save_file

    graph = onnx.load(model).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name: array for name, array in arrays.items() if name.startswith("model.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = np.ascontiguousarray(arrays[node.input[1]].T)
    shutil.copytree(model.parent, folder, ignore=shutil.ignore_patterns("*.onnx"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


TOOLS: Mapping[str, Callable[..., onnx.ModelProto]] = {
    "onnxruntime": run_onnxruntime,
    "modelopt": run_modelopt,
    "nncf": run_nncf,
    "genai": run_genai,
}


def main() -> None:
    call, (model, ids, output) = Call(**json.loads(sys.argv[1])), map(Path, sys.argv[2:])
    made = TOOLS[call.tool](model, np.load(ids), **call.settings)
    onnx.save(made, output)


if __name__ == "__main__":
    main()
