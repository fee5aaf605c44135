"""What other tools for AWQ on ONNX get wrong, one test for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Array, GraphBuilder, decoder_feed, gated_mlp, norm_and_readers, run, save, tiny_decoder
from onnx import numpy_helper

from awq_onnx import Recipe, edit, pipeline
from awq_onnx.codec import Float32
from awq_onnx.groups import GroupResult
from awq_onnx.kernels import reference
from awq_onnx.passes.absorb import Absorber, Gain, Linear
from awq_onnx.passes.sites import Refusal

IDS = np.random.default_rng(0).integers(0, 160, (16, 24))


@dataclass(frozen=True)
class Quantized:
    """A written model, with what the pipeline decided on the way."""

    path: Path
    model: onnx.ModelProto
    groups: Sequence[GroupResult]

    @property
    def tensors(self) -> dict[str, Array]:
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}

    @property
    def ops(self) -> list[str]:
        return [node.op_type for node in self.model.graph.node]

    @property
    def quantized_names(self) -> list[str]:
        return [node.name for node in self.model.graph.node if node.op_type == "MatMulNBits"]

    def node(self, name: str) -> onnx.NodeProto:
        found: onnx.NodeProto
        (found,) = (node for node in self.model.graph.node if node.name == name)
        return found

    def weight(self, name: str) -> Float32:
        """What the packed tensors of a MatMulNBits stand for: (K, N)."""
        node = self.node(name)
        (K,) = (attribute.i for attribute in node.attribute if attribute.name == "K")
        codes, scales, *zero_points = (self.tensors[name] for name in node.input[1:4] if name)
        return reference.dequantize(codes, scales, zero_points[0] if zero_points else None, K).T

    def unfolded_weight(self, name: str) -> Float32:
        """The weight with all folds undone: divided by its input's scale, multiplied by what it absorbed."""
        weight = self.weight(name)
        for group in self.groups:
            if any(site.site.name == name for site in group.sites):
                weight = weight / group.scale[:, None]
            for absorber, divisor in folds(group):
                if isinstance(absorber, Linear) and absorber.name == name:
                    weight = weight * divisor
        return weight


def folds(group: GroupResult) -> list[tuple[Absorber, Float32]]:
    """Each absorber and what its channels were divided by."""
    return [] if isinstance(group.folded, Refusal) else list(zip(group.folded, group.divided, strict=True))


def folded_linears(group: GroupResult) -> list[tuple[Linear, Float32]]:
    return [(absorber, divisor) for absorber, divisor in folds(group) if isinstance(absorber, Linear)]


class Pipeline:
    """Quantise models in one folder and keep what was decided about their groups."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._groups: list[GroupResult] = []
        apply = edit.apply

        def listening(model: Any, results: list[GroupResult], *rest: Any) -> None:
            self._groups = list(results)
            apply(model, results, *rest)

        monkeypatch.setattr(edit, "apply", listening)

    def __call__(
        self,
        model: onnx.ModelProto | Path,
        calibration: Any,
        *,
        name: str = "quantized",
        overwrite: bool = False,
        **settings: Any,
    ) -> Quantized:
        path = self.folder / f"{name}.onnx"
        recipe = Recipe(accuracy_level=0, **settings)
        pipeline.quantize(model, path, recipe, calibration=calibration, overwrite=overwrite)
        return Quantized(path, onnx.load(path), self._groups)


@pytest.fixture
def quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    return Pipeline(tmp_path, monkeypatch)


def initializers(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def replace(model: onnx.ModelProto, name: str, values: Array) -> None:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values.astype(numpy_helper.to_array(tensor).dtype), name))


def relative_error(actual: Array, expected: Array) -> float:
    expected = expected.astype(np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def random_x(K: int, *, loud: int = 5, dtype: type = np.float32) -> Array:
    """x (16, 6, K) with one channel that carries most of it."""
    x = np.random.default_rng(1).standard_normal((16, 6, K))
    x[..., loud] *= 20
    return x.astype(dtype)


# Folds


def test_siblings_share_one_scale_that_is_folded_once(quantize: Pipeline) -> None:
    """Elsewhere each sibling has its own scale and only the last one's is folded."""
    model = norm_and_readers(columns=(48, 32, 8)).model()
    made = quantize(model, random_x(64))
    (group,) = made.groups
    ((absorber, _),) = folds(group)
    assert isinstance(absorber, Gain)
    assert group.scale.max() > 2 * group.scale.min()
    np.testing.assert_allclose(made.tensors["norm.weight"] * group.scale, initializers(model)["norm.weight"], rtol=1e-6)
    for index in range(3):
        assert relative_error(made.unfolded_weight(f"reader_{index}"), initializers(model)[f"w{index}"]) < 0.3
    assert "Mul" not in set(made.ops) - {node.op_type for node in model.graph.node}
    assert len(made.ops) == len(model.graph.node)


def test_a_matmul_fed_by_an_input_of_the_model_has_no_scale(quantize: Pipeline) -> None:
    """Elsewhere its weight is scaled and nothing compensates it."""
    builder = GraphBuilder()
    builder.output(builder.add("MatMul", builder.input("x", ["batch", "t", 64]), builder.weight(64, 48, "w"), name="m"))
    model, x = builder.model(), random_x(64)
    made = quantize(model, x)
    (group,) = made.groups
    np.testing.assert_array_equal(group.scale, np.ones(64))
    assert made.ops == ["MatMulNBits"]
    assert relative_error(made.weight("m"), initializers(model)["w"]) < 0.12
    (output,) = run(made.path, {"x": x}).values()
    assert relative_error(output, x @ initializers(model)["w"]) < 0.12


def two_norms_on_one_gain() -> GraphBuilder:
    builder = GraphBuilder()
    gain = builder.constant(np.linspace(0.5, 2, 64), "gain")
    for name in ("a", "b"):
        normed = builder.add("Mul", builder.input(name, ["batch", "t", 64]), gain, name=f"{name}.norm")
        weight = builder.weight(64, 48, f"{name}.w")
        builder.output(builder.add("MatMul", normed, weight, name=f"{name}.reader", to=f"{name}.out"))
    return builder


def test_a_gain_that_two_norms_share_is_not_divided_twice(quantize: Pipeline) -> None:
    """Elsewhere a shared initializer is divided in place, under everyone who reads it."""
    model = two_norms_on_one_gain().model()
    feed = {"a": random_x(64, loud=3), "b": random_x(64, loud=40)}
    made = quantize(model, feed)
    scales = [group.scale for group in made.groups]
    assert np.abs(scales[0] / scales[1] - 1).max() > 0.5
    for name, scale in zip("ab", scales, strict=True):
        gain = made.tensors[made.node(f"{name}.norm").input[1]]
        np.testing.assert_allclose(gain * scale, initializers(model)["gain"], rtol=1e-6)
    expected, actual = run(model, feed), run(made.path, feed)
    assert max(relative_error(actual[name], expected[name]) for name in expected) < 0.1


def test_a_number_that_many_nodes_share_is_not_divided(quantize: Pipeline) -> None:
    builder = GraphBuilder()
    x, half = builder.input("x", ["batch", "t", 64]), builder.constant(0.5, "half")
    normed = builder.add("Mul", builder.rms_norm(x, 64, "norm"), half, name="halved")
    builder.output(builder.add("MatMul", normed, builder.weight(64, 48, "w"), name="reader", to="y"))
    builder.output(builder.add("Mul", x, half, to="half_x"))
    made = quantize(builder.model(), random_x(64))
    assert made.tensors["half"] == 0.5
    assert relative_error(made.unfolded_weight("reader"), initializers(builder.model())["w"]) < 0.3


@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_gemm_before_is_divided_along_its_columns(quantize: Pipeline, trans_b: int) -> None:
    """Elsewhere a Gemm with transB=1 is divided along the wrong axis."""
    builder = GraphBuilder()
    first = builder.rng.standard_normal((64, 64)) * np.where(np.arange(64) % 11 == 2, 12, 1)  # loud channels
    weight = builder.constant(first.T if trans_b else first, "first")
    bias = builder.constant(builder.rng.standard_normal(64), "bias")
    gemm = builder.add("Gemm", builder.input("x", ["rows", 64]), weight, bias, name="gemm", transB=trans_b)
    builder.output(builder.add("MatMul", gemm, builder.weight(64, 48, "second"), name="reader"))
    model = builder.model()
    made = quantize(model, random_x(64).reshape(-1, 64))
    ((absorber, divisor),) = (one for group in made.groups for one in folded_linears(group))
    assert absorber.name == "gemm"
    assert np.ptp(np.log(divisor)) > 1
    assert relative_error(made.unfolded_weight("gemm"), first) < 0.15
    assert relative_error(made.unfolded_weight("reader"), initializers(model)["second"]) < 0.3
    np.testing.assert_allclose(made.tensors["gemm.bias"] * divisor, initializers(model)["bias"], rtol=1e-6)


@pytest.mark.parametrize("constants", [1, 2])
def test_a_layer_normalization_before_needs_no_bias(quantize: Pipeline, constants: int) -> None:
    """Elsewhere one without bias crashes, and a parent with two initializers is a KeyError."""
    builder = GraphBuilder()
    vectors = [builder.constant(np.linspace(0.5, 2, 64), f"constant_{index}") for index in range(constants)]
    normed = builder.add("LayerNormalization", builder.input("x", ["batch", "t", 64]), *vectors, name="norm")
    builder.output(builder.add("MatMul", normed, builder.weight(64, 48, "w"), name="reader", to="y"))
    model, x = builder.model(), random_x(64)
    made = quantize(model, x)
    assert made.ops == ["LayerNormalization", "MatMulNBits"]
    assert relative_error(run(made.path, {"x": x})["y"], run(model, {"x": x})["y"]) < 0.12


def loud(model: onnx.ModelProto) -> onnx.ModelProto:
    """With channels of v and up that stand out, so that o and down ask for a scale."""
    for name, values in initializers(model).items():
        if name.endswith(("v_proj.weight", "up_proj.weight", "up.weight")):
            replace(model, name, values * np.where(np.arange(values.shape[1]) % 11 == 2, 12, 1))
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_fold_into_a_quantised_parent_is_not_lost(
    quantize: Pipeline, kv_heads: int, bias: bool, symmetric: bool
) -> None:
    """v and up are rounded before o and down find their scales: with all folds undone every weight is still itself."""
    model = loud(tiny_decoder(kv_heads=kv_heads, bias=bias))
    made = quantize(model, IDS, symmetric=symmetric)
    linears = [group for group in made.groups if folded_linears(group)]
    assert len(linears) == 4
    assert sum(np.ptp(np.log(group.scale)) > 1 for group in linears) >= 2  # else there is nothing to lose
    for name in made.quantized_names:
        weight = initializers(model)[name.replace("/MatMul", ".weight")]
        assert relative_error(made.unfolded_weight(name), weight) < 0.4, name  # a lost fold: more than 2


def test_biases_are_divided_with_their_weights(quantize: Pipeline) -> None:
    model = loud(tiny_decoder(bias=True))
    made = quantize(model, IDS)
    folded = [one for group in made.groups for one in folded_linears(group)]
    assert len(folded) == 4
    for absorber, divisor in folded:
        name = absorber.name.replace("/MatMul", ".bias")
        np.testing.assert_allclose(made.tensors[name] * divisor, initializers(model)[name], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-3), (np.float16, 0.03)])
def test_all_folds_cancel_in_the_written_model(quantize: Pipeline, dtype: type, tolerance: float) -> None:
    """It computes what the original computes with every weight replaced by its rounded one, folds undone."""
    model = loud(tiny_decoder(dtype=dtype, bias=True))
    made = quantize(model, IDS)
    for name in made.quantized_names:
        replace(model, name.replace("/MatMul", ".weight"), made.unfolded_weight(name))
    feed = decoder_feed(model, IDS[:4])
    assert relative_error(run(made.path, feed)["logits"], run(model, feed)["logits"]) < tolerance


# Numbers


def test_blocks_run_along_k(quantize: Pipeline) -> None:
    """Elsewhere a block is a strided row: then the small half of K shares its scales with the large half."""
    builder = GraphBuilder()
    weight = np.random.default_rng(2).standard_normal((64, 48))
    weight[:32] /= 1000
    normed = builder.input("x", ["batch", "t", 64])
    builder.output(builder.add("MatMul", normed, builder.constant(weight, "w"), name="m"))
    made = quantize(builder.model(), random_x(64))
    assert relative_error(made.weight("m")[:32], weight[:32]) < 0.12
    assert relative_error(made.weight("m")[32:], weight[32:]) < 0.12


@pytest.mark.parametrize("N", [48, 47])
def test_zero_points_are_packed_row_by_row(quantize: Pipeline, N: int) -> None:
    """Elsewhere they are packed flat, which is wrong for an odd number of blocks; three here."""
    builder = GraphBuilder()
    weight = np.random.default_rng(2).standard_normal((96, N)) + np.linspace(-3, 3, N)
    builder.output(
        builder.add("MatMul", builder.input("x", ["b", "t", 96]), builder.constant(weight, "w"), name="m", to="y")
    )
    x = random_x(96)
    made = quantize(builder.model(), x)
    zero_points = made.tensors[made.node("m").input[3]]
    assert (zero_points.dtype, zero_points.shape) == (np.dtype(np.uint8), (N, 2))
    output = run(made.path, {"x": x})["y"]
    assert relative_error(output, x @ made.weight("m")) < 1e-5
    assert relative_error(made.weight("m"), weight) < 0.12


def test_a_half_precision_model_gets_half_precision_scales(quantize: Pipeline) -> None:
    made = quantize(tiny_decoder(dtype=np.float16), IDS)
    scales = [made.tensors[f"{name}.scales"] for name in made.quantized_names]
    assert len(scales) == 14
    assert {values.dtype for values in scales} == {np.dtype(np.float16)}
    assert made.tensors["/layers.0/input_layernorm.weight"].dtype == np.float16


def test_a_channel_that_is_always_zero_leaves_no_nan(quantize: Pipeline) -> None:
    """Users of other tools see NaN scales."""
    model = norm_and_readers().model()
    gain = initializers(model)["norm.weight"].copy()
    gain[[3, 40]] = 0
    replace(model, "norm.weight", gain)
    made = quantize(model, random_x(64))
    assert all(np.isfinite(values).all() for values in made.tensors.values() if values.dtype.kind == "f")
    assert not made.tensors["norm.weight"][[3, 40]].any()
    x = random_x(64)
    expected, actual = run(model, {"x": x}), run(made.path, {"x": x})
    assert max(relative_error(actual[name], expected[name]) for name in expected) < 0.1


def test_an_all_zero_weight_stays_zero(quantize: Pipeline) -> None:
    model = norm_and_readers().model()
    replace(model, "w1", np.zeros((64, 32)))
    made = quantize(model, random_x(64))
    assert not made.weight("reader_1").any()


# Graphs and files


def test_a_weight_behind_a_transpose_is_quantised(quantize: Pipeline) -> None:
    """Elsewhere it is skipped without a word."""
    builder = GraphBuilder()
    turned = builder.add("Transpose", builder.weight(48, 64, "w"), perm=[1, 0], name="turn")
    builder.output(builder.add("MatMul", builder.input("x", ["batch", "t", 64]), turned, name="m"))
    made = quantize(builder.model(), random_x(64))
    assert made.ops == ["MatMulNBits"]
    assert relative_error(made.weight("m"), initializers(builder.model())["w"].T) < 0.12


@pytest.mark.parametrize("domain", ["com.microsoft", "com.example"])
def test_the_opset_of_onnx_need_not_be_imported_first(quantize: Pipeline, domain: str) -> None:
    model = tiny_decoder(layers=1)
    model.opset_import.insert(0, onnx.helper.make_opsetid(domain, 1))
    made = quantize(model, IDS)
    imports = {opset.domain: opset.version for opset in made.model.opset_import}
    assert imports == {domain: 1, "": 18, "com.microsoft": 1}
    assert made.ops.count("MatMulNBits") == 7


def test_writing_again_does_not_double_the_data(quantize: Pipeline) -> None:
    model = gated_mlp().model()
    first = quantize(model, random_x(64))
    data = first.path.with_name("quantized.onnx.data")
    before = data.read_bytes()
    quantize(model, random_x(64), overwrite=True)
    assert data.read_bytes() == before


def test_two_models_in_one_folder_keep_their_own_data(quantize: Pipeline) -> None:
    x = random_x(64)
    first = quantize(gated_mlp(seed=1).model(), x, name="first")
    before = run(first.path, {"x": x})
    second = quantize(gated_mlp(seed=2).model(), x, name="second")
    for name, values in run(first.path, {"x": x}).items():
        np.testing.assert_array_equal(values, before[name])
        assert relative_error(run(second.path, {"x": x})[name], values) > 0.5


def test_the_model_that_was_read_is_not_changed(quantize: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    path = save(tiny_decoder(), tmp_path / "original" / "model.onnx", external=True)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    quantize(path, IDS)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
