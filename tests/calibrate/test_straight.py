"""calibrate/straight.py: of every If around layers the branch that the data take is run; both are quantised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, run, save
from folding import assert_close
from onnx import TensorProto, helper

import awq_onnx
from awq_onnx.calibrate import channels
from awq_onnx.calibrate.straight import straighten
from awq_onnx.exact import fold_random_scales
from awq_onnx.passes.branches import separate_names
from awq_onnx.plan import make_plan
from awq_onnx.store import open_model

K, N = 16, 8
HIDDEN, HEADS, SIZE, VOCABULARY, LAYERS = 64, 4, 16, 96, 2
make = helper.make_node
Feed = dict[str, Array]


def body(name: str, nodes: Sequence[onnx.NodeProto], *outputs: str) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs]
    return helper.make_graph(list(nodes), name, [], values)


def choosing(builder: GraphBuilder, condition: str, then: onnx.GraphProto, other: onnx.GraphProto, to: str) -> None:
    builder.nodes.append(make("If", [condition], [to], name=f"if_{to}", then_branch=then, else_branch=other))


def short(builder: GraphBuilder) -> str:
    """A condition that the data decide: whether x has fewer than seven tokens."""
    length = builder.add("Gather", builder.add("Shape", "x"), builder.constant(1, dtype=np.int64), axis=0)
    return builder.add("Less", length, builder.constant(7, dtype=np.int64), to="short")


def layer(weight: str, output: str) -> onnx.NodeProto:
    return make("MatMul", ["x", weight], [output], name=output)


def with_weights(*names: str) -> GraphBuilder:
    builder = GraphBuilder()
    builder.input("x", ["batch", "tokens", K])
    for name in names:
        builder.weight(K, N, name)
    return builder


def straight_ops(model: onnx.ModelProto, feed: Feed, folder: Path) -> tuple[list[str], list[str] | None]:
    """The names of the layers along the branches that are taken, and along the others."""
    with open_model(save(model, folder / "model.onnx")) as opened:
        separate_names(opened.model.graph)
        made = straighten(opened, make_plan(opened.model).survey, feed)
        taken = made.opened.model
        expected = run(model, feed)
        assert_close(run(ir.to_proto(taken), {name: feed[name] for name in feed}), expected)
        return layers_of(ir.to_proto(taken)), None if made.others is None else layers_of(made.others)


def layers_of(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type == "MatMul"]


def feed_of(**inputs: Any) -> Feed:
    x: Array = np.random.default_rng(2).standard_normal((2, 5, K)).astype(np.float32)
    return {"x": x, **{name: np.array(value) for name, value in inputs.items()}}


# Which branch


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_input_of_the_model_decides(tmp_path: Path, flag: bool, shape: tuple[int, ...]) -> None:
    builder = with_weights("a", "b")
    builder.input("flag", list(shape), np.bool_)
    choosing(builder, "flag", body("t", [layer("a", "yes")], "yes"), body("e", [layer("b", "no")], "no"), "y")
    builder.output("y", ["batch", "tokens", N])
    feed = feed_of(flag=np.full(shape, flag))
    assert straight_ops(builder.model(), feed, tmp_path) == ((["yes"], ["no"]) if flag else (["no"], ["yes"]))


@pytest.mark.parametrize("tokens", [5, 9])
def test_a_condition_that_is_computed_decides(tmp_path: Path, tokens: int) -> None:
    builder = with_weights("a", "b")
    choosing(builder, short(builder), body("t", [layer("a", "yes")], "yes"), body("e", [layer("b", "no")], "no"), "y")
    builder.output("y", ["batch", "tokens", N])
    feed: Feed = {"x": np.ones((2, tokens, K), np.float32)}
    expected = (["yes"], ["no"]) if tokens < 7 else (["no"], ["yes"])
    assert straight_ops(builder.model(), feed, tmp_path) == expected


def test_a_condition_that_is_a_constant_decides(tmp_path: Path) -> None:
    builder = with_weights("a", "b")
    condition = builder.constant(False, "off", np.bool_)
    choosing(builder, condition, body("t", [layer("a", "yes")], "yes"), body("e", [layer("b", "no")], "no"), "y")
    builder.output("y", ["batch", "tokens", N])
    assert straight_ops(builder.model(), feed_of(), tmp_path) == (["no"], ["yes"])


def test_a_condition_that_an_if_makes_decides(tmp_path: Path) -> None:
    """An If without layers, before one with layers."""
    builder = with_weights("a", "b")
    builder.input("flag", [], np.bool_)
    value = helper.make_tensor_value_info("not", TensorProto.BOOL, [])
    same = helper.make_tensor_value_info("same", TensorProto.BOOL, [])
    turned = helper.make_graph([make("Not", ["flag"], ["not"])], "t", [], [value])
    kept = helper.make_graph([make("Not", ["flag"], ["same"])], "e", [], [same])
    choosing(builder, "flag", turned, kept, "made")
    choosing(builder, "made", body("t", [layer("a", "yes")], "yes"), body("e", [layer("b", "no")], "no"), "y")
    builder.output("y", ["batch", "tokens", N])
    assert straight_ops(builder.model(), feed_of(flag=True), tmp_path) == (["no"], ["yes"])


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_an_if_in_an_if_is_decided_too(tmp_path: Path, outer: bool, inner: bool) -> None:
    builder = with_weights("a", "b", "c")
    builder.input("outer", [], np.bool_)
    builder.input("inner", [], np.bool_)
    bodies = body("t2", [layer("a", "both")], "both"), body("e2", [layer("b", "one")], "one")
    nested = make("If", ["inner"], ["nested"], name="nested", then_branch=bodies[0], else_branch=bodies[1])
    choosing(builder, "outer", body("t", [nested], "nested"), body("e", [layer("c", "none")], "none"), "y")
    builder.output("y", ["batch", "tokens", N])
    taken, _ = straight_ops(builder.model(), feed_of(outer=outer, inner=inner), tmp_path)
    assert taken == (["none"] if not outer else ["both"] if inner else ["one"])


def test_an_if_in_an_if_whose_condition_is_made_inside_stays_and_is_quantised(tmp_path: Path) -> None:
    builder = with_weights("a", "b", "c")
    short(builder)
    builder.constant(0.0, "zero")
    bodies = body("t2", [layer("a", "both")], "both"), body("e2", [layer("b", "one")], "one")
    nodes = [
        make("ReduceSum", ["x"], ["sum"], keepdims=0),
        make("Greater", ["sum", "zero"], ["positive"]),
        make("If", ["positive"], ["nested"], name="nested", then_branch=bodies[0], else_branch=bodies[1]),
    ]
    choosing(builder, "short", body("t", nodes, "nested"), body("e", [layer("c", "none")], "none"), "y")
    builder.output("y", ["batch", "tokens", N])
    assert_quantised(builder.model(), tmp_path, layers=3)


def test_ifs_without_layers_stay_as_they_are() -> None:
    builder = with_weights("a")
    builder.input("flag", [], np.bool_)
    made = builder.add("MatMul", "x", "a", name="layer")
    bodies = (body(kind, [make(op, [made], [kind])], kind) for kind, op in (("then", "Abs"), ("else", "Neg")))
    choosing(builder, "flag", *bodies, "y")
    builder.output("y", ["batch", "tokens", N])
    with open_model(builder.model()) as opened:
        made_straight = straighten(opened, make_plan(opened.model).survey, feed_of(flag=True))
        assert made_straight.opened is opened
        assert made_straight.others is None


def test_a_branch_that_hands_on_what_is_outside_is_followed(tmp_path: Path) -> None:
    builder = with_weights("a")
    short(builder)
    outside = builder.add("Neg", "x", to="outside")
    square = builder.weight(K, K, "square")
    kept = body("e", [make("Identity", [outside], ["same"])], "same")
    choosing(builder, "short", body("t", [make("MatMul", ["x", square], ["yes"], name="yes")], "yes"), kept, "y")
    builder.output("y", ["batch", "tokens", K])
    assert_quantised(builder.model(), tmp_path, layers=1)


def test_branches_with_weights_of_one_name_keep_both(tmp_path: Path) -> None:
    builder = GraphBuilder()
    builder.input("x", ["batch", "tokens", K])
    short(builder)
    bodies = []
    for kind in ("t", "e"):
        bodies.append(body(kind, [make("MatMul", ["x", "w"], ["out"], name="layer")], "out"))
        weight = builder.rng.standard_normal((K, N)).astype(np.float32)
        bodies[-1].initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    choosing(builder, "short", *bodies, "y")
    builder.output("y", ["batch", "tokens", N])
    assert_quantised(builder.model(), tmp_path, layers=2)


def assert_quantised(model: onnx.ModelProto, folder: Path, *, layers: int) -> None:
    """Calibrated along one branch; both are close to the original."""
    x: Array = np.random.default_rng(3).standard_normal((8, 9, K)).astype(np.float32)
    recipe = awq_onnx.Recipe(accuracy_level=0)
    report = awq_onnx.quantize(model, folder / "out.onnx", recipe, calibration={"x": x[:, :5]})
    assert len(report.matmuls) == layers
    for tokens in (5, 9):
        feed = {"x": x[:, :tokens]}
        expected, actual = run(model, feed)["y"], run(folder / "out.onnx", feed)["y"]
        assert np.linalg.norm(actual - expected) < 0.2 * np.linalg.norm(expected)


# A merged decoder: the first step and the later ones in one file


class MergedDecoder:
    """A decoder with biases, whose branches have nodes and values of the same names and weights of the outer graph."""

    def __init__(self) -> None:
        self.builder = GraphBuilder()
        builder = self.builder
        builder.input("input_ids", ["batch_size", "sequence_length"], np.int64)
        builder.input("attention_mask", ["batch_size", "total_length"], np.int64)
        builder.constant(builder.rng.standard_normal((VOCABULARY, HIDDEN)), "table")
        builder.constant([0, 0, HEADS, SIZE], "split", np.int64)
        builder.constant([0, 0, HIDDEN], "merge", np.int64)
        for index in range(LAYERS):
            for kind in ("key", "value"):
                builder.input(f"past_key_values.{index}.{kind}", ["batch_size", HEADS, "past_length", SIZE])
            for name in ("q", "k", "v", "o"):
                builder.weight(HIDDEN, HIDDEN, f"{index}.{name}")
            builder.constant(builder.rng.standard_normal(HIDDEN), f"{index}.v.bias")
            builder.constant(builder.outlier_gain(HIDDEN), f"{index}.gain")
        builder.input("use_cache_branch", [1], np.bool_)
        builder.constant(builder.rng.standard_normal((HIDDEN, VOCABULARY)) / 4, "head")
        builder.constant(np.triu(np.full((64, 64), -1e4), 1), "causal")

    def model(self) -> onnx.ModelProto:
        presents = [f"present.{index}.{kind}" for index in range(LAYERS) for kind in ("key", "value")]
        first, later = (
            body(name, self._branch(cache), *(f"{one}" for one in ("inner_logits", *(f"inner_{p}" for p in presents))))
            for name, cache in (("first", False), ("later", True))
        )
        self.builder.nodes.append(
            make(
                "If",
                ["use_cache_branch"],
                ["logits", *presents],
                name="optimum::if",
                then_branch=later,
                else_branch=first,
            )
        )
        self.builder.output("logits", ["batch_size", "sequence_length", VOCABULARY])
        for name in presents:
            self.builder.output(name, ["batch_size", HEADS, "any_length", SIZE])
        return self.builder.model()

    def _branch(self, cache: bool) -> list[onnx.NodeProto]:
        nodes = [make("Gather", ["table", "input_ids"], ["x0"], name="embed")]
        for index in range(LAYERS):
            nodes += self._layer(index, cache)
        return [*nodes, make("MatMul", [f"x{LAYERS}", "head"], ["inner_logits"], name="lm_head")]

    def _layer(self, index: int, cache: bool) -> list[onnx.NodeProto]:
        p = f"layer{index}"
        nodes = [make("LayerNormalization", [f"x{index}", f"{index}.gain"], [f"{p}.normed"], name=f"{p}.norm")]
        for name in ("q", "k", "v"):
            made = f"{p}.{name}"
            nodes.append(make("MatMul", [f"{p}.normed", f"{index}.{name}"], [f"{made}.flat"], name=f"{made}_proj"))
            if name == "v":
                nodes.append(make("Add", [f"{made}.flat", f"{index}.v.bias"], [f"{made}.biased"], name=f"{made}.add"))
            flat = f"{made}.biased" if name == "v" else f"{made}.flat"
            nodes.append(make("Reshape", [flat, "split"], [f"{made}.heads"], name=f"{made}.reshape"))
            nodes.append(make("Transpose", [f"{made}.heads"], [f"{made}.new"], name=f"{made}.turn", perm=[0, 2, 1, 3]))
        for name, kind in (("k", "key"), ("v", "value")):
            present = f"inner_present.{index}.{kind}"
            if cache:
                past = f"past_key_values.{index}.{kind}"
                nodes.append(make("Concat", [past, f"{p}.{name}.new"], [present], name=f"{p}.{name}.cat", axis=2))
            else:
                nodes.append(make("Identity", [f"{p}.{name}.new"], [present], name=f"{p}.{name}.same"))
        return [*nodes, *self._attention(index, p, cache)]

    def _attention(self, index: int, p: str, cache: bool) -> list[onnx.NodeProto]:
        key, value = f"inner_present.{index}.key", f"inner_present.{index}.value"
        nodes = [
            make("Transpose", [key], [f"{p}.k.turned"], perm=[0, 1, 3, 2]),
            make("MatMul", [f"{p}.q.new", f"{p}.k.turned"], [f"{p}.scores"], name=f"{p}.scores"),
        ]
        scores = f"{p}.scores"
        if not cache:  # a later step is one token, which sees all before it
            scores = f"{p}.masked"
            nodes += [
                make("Shape", ["input_ids"], [f"{p}.length"], start=1, end=2),
                make("Constant", [], [f"{p}.zero"], value_ints=[0, 0]),
                make("Concat", [f"{p}.length", f"{p}.length"], [f"{p}.ends"], axis=0),
                make("Slice", ["causal", f"{p}.zero", f"{p}.ends"], [f"{p}.mask"]),
                make("Add", [f"{p}.scores", f"{p}.mask"], [scores]),
            ]
        return [
            *nodes,
            make("Softmax", [scores], [f"{p}.weights"], axis=-1),
            make("MatMul", [f"{p}.weights", value], [f"{p}.mixed"], name=f"{p}.mix"),
            make("Transpose", [f"{p}.mixed"], [f"{p}.back"], perm=[0, 2, 1, 3]),
            make("Reshape", [f"{p}.back", "merge"], [f"{p}.flat"]),
            make("MatMul", [f"{p}.flat", f"{index}.o"], [f"{p}.out"], name=f"{p}.o_proj"),
            make("Add", [f"x{index}", f"{p}.out"], [f"x{index + 1}"]),
        ]


IDS: Array = np.random.default_rng(5).integers(0, VOCABULARY, (2, 7))


def merged() -> onnx.ModelProto:
    return MergedDecoder().model()


def step(model: onnx.ModelProto | Path, ids: Array, past: Feed | None) -> tuple[Array, Feed]:
    """One run: logits, and the caches as the inputs they become."""
    names = [f"{index}.{kind}" for index in range(LAYERS) for kind in ("key", "value")]
    before = past or {f"past_key_values.{n}": np.zeros((len(ids), HEADS, 0, SIZE), np.float32) for n in names}
    total = ids.shape[1] + next(iter(before.values())).shape[2]
    mask = np.ones((len(ids), total), np.int64)
    flag = np.array([past is not None])
    made = run(model, {"input_ids": ids, "attention_mask": mask, **before, "use_cache_branch": flag})
    return made["logits"], {f"past_key_values.{n}": made[f"present.{n}"] for n in names}


def by_decoding(model: onnx.ModelProto | Path, ids: Array, prompt: int = 3) -> Array:
    """The logits (B, T, V): the prompt through the first branch, then token by token through the other."""
    logits, past = step(model, ids[:, :prompt], None)
    rows = [logits]
    for position in range(prompt, ids.shape[1]):
        logits, past = step(model, ids[:, position : position + 1], past)
        rows.append(logits)
    return np.concatenate(rows, axis=1)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[awq_onnx.Report, Path]:
    """The merged decoder in 4 bits."""
    folder = tmp_path_factory.mktemp("merged")
    recipe = awq_onnx.Recipe(samples=8, sequence_length=16, accuracy_level=0)
    report = awq_onnx.quantize(save(merged(), folder / "model.onnx"), folder / "out.onnx", recipe)
    return report, folder / "out.onnx"


def test_the_merged_decoder_itself_decodes_as_it_reads() -> None:
    model = merged()
    assert_close({"logits": by_decoding(model, IDS)}, {"logits": step(model, IDS, None)[0]})


def test_a_merged_decoder_is_folded_in_both_branches(done: tuple[awq_onnx.Report, Path]) -> None:
    report, _ = done
    assert len(report.matmuls) == 2 * 4 * LAYERS
    assert [one.reason for one in report.matmuls if one.fold is None] == []
    scaled = {one.name for one in report.matmuls if one.fold == "MatMul" and one.alpha > 0}
    assert report.scaled_caches == len(scaled) >= 1
    assert len({one.name for one in report.matmuls}) == 4 * LAYERS  # each name once in either branch


def test_a_quantised_merged_decoder_decodes_as_it_reads(done: tuple[awq_onnx.Report, Path]) -> None:
    _, output = done
    at_once = step(output, IDS, None)[0]
    decoded = by_decoding(output, IDS)
    assert np.abs(decoded - at_once).max() < 1e-4 * np.abs(at_once).max()
    assert np.abs(decoded - step(merged(), IDS, None)[0]).max() > 1e-3 * np.abs(at_once).max()  # it is quantised


def test_weights_that_branches_share_are_packed_once(done: tuple[awq_onnx.Report, Path]) -> None:
    _, output = done
    codes = {}
    for node in ir.load(output).graph.all_nodes():
        if node.op_type == "MatMulNBits":
            codes.setdefault(node.name, []).append(node.inputs[1])
    assert len(codes) == 4 * LAYERS
    assert all(len(pair) == 2 and pair[0] is pair[1] for pair in codes.values())


def test_random_scales_change_nothing_in_either_branch() -> None:
    model = merged()
    with open_model(model) as opened:
        plan = make_plan(opened.model)
        feed = {
            "input_ids": IDS,
            "attention_mask": np.ones_like(IDS),
            **{
                f"past_key_values.{index}.{kind}": np.zeros((2, HEADS, 0, SIZE), np.float32)
                for index in range(LAYERS)
                for kind in ("key", "value")
            },
            "use_cache_branch": np.array([False]),
        }
        straight = straighten(opened, plan.survey, feed)
        assert straight.others is not None
        models = [ir.to_proto(straight.opened.model), straight.others]
        maps = channels.trace(models, opened.folder, plan.groups, plan.survey, feed)
        folded = fold_random_scales(opened, plan.groups, maps)
        assert len(folded) == len(plan.groups) == 2 * LAYERS
        after = ir.to_proto(opened.model)
        assert_close({"logits": by_decoding(after, IDS)}, {"logits": by_decoding(model, IDS)}, 1e-4)
        scaled = step(after, IDS, None)[1]["past_key_values.0.value"]
        assert not np.allclose(scaled, step(model, IDS, None)[1]["past_key_values.0.value"], rtol=0.1)
