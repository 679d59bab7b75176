#!/usr/bin/env python3
"""Writes detection models, images and the expected boxes.

    python detect_reference.py OUT_DIR

This is an independent reference for the agent's detection pipeline. It is
written from the published formats only (the Ultralytics YOLOv8, YOLOv5 and
YOLOv10 exports, the official YOLOX export, the usual three-output exports
with non-maximum suppression in the graph) and shares no code with the Rust
implementation: letterbox, decoding, non-maximum suppression and the mapping to
image coordinates are implemented here in plain numpy, and the models run in
ONNX Runtime.

OUT_DIR receives six ONNX models, four PNG images and `expected.json`, which
lists the detections of each model and image, sorted by score, in pixels of
the source image and clipped to it.

The networks are small, with weights that are set by hand so that they detect
something: class 0 responds to red, 1 to green and 2 to blue patches that fit
the stride (about four to six cells wide). The four distances of a box are the
numbers of coloured cells towards each side, whatever their colour. A patch of
two colours therefore gives two boxes of different classes at nearly the same
place, which suppression by class has to keep, and each patch gives several
boxes of one class, of which it has to keep one. Seeded noise on the weights
keeps every channel in use.

The expected detections do not depend on rounding. For every model and image
the script checks, and exits with an error otherwise, that

  * no score is within 0.01 of the threshold,
  * no overlap that decides a suppression is within 0.02 of the limit,
  * no box wins by less than 0.002 over a noticeably different one that it
    suppresses, and no class by less than 0.03 over the next,
  * clipping before instead of after the suppression changes nothing,
  * the same boxes (overlap above 0.97) remain if the pixels of the model input
    change by one grey level, at random or all together.

It also checks that the images exercise the pipeline: 5 to 60 candidates, more
than one class, boxes inside and at the edge, same-class overlaps to remove and
other-class overlaps to keep. The positions of the patches are chosen
accordingly.
"""

import json
import math
import os
import sys
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

LABELS = ["scratch", "dent", "stain"]
NC = len(LABELS)
STRIDES = (8, 16, 32)
REG_MAX = 16
THRESHOLD, IOU, TOP_K = 0.25, 0.45, 100
GAIN = 12.0  # features are carried at this scale, where SiLU is nearly linear
STEEP = 60.0  # slope of the first layer
SHARP, STEP = 250.0, 0.025  # slope and step width of the class scores, see class_logits
BIAS = 0.47  # responses above it are detections


# ---------------------------------------------------------------- graph parts


class Net:
    """Collects nodes and weights; every method returns the names of its outputs."""

    def __init__(self, seed):
        self.nodes, self.weights, self.count = [], [], {}
        self.rng = np.random.default_rng(seed)

    def op(self, kind, *inputs, outputs=1, name=None, **attributes):
        number = self.count.get(kind, 0)
        self.count[kind] = number + 1
        node = f"/model/{kind}" + (f"_{number}" if number else "")
        if name:
            names = [name] if isinstance(name, str) else list(name)
        else:
            names = [f"{node}_output_{i}" for i in range(outputs)]
        inputs = [i if isinstance(i, str) else self.const(i) for i in inputs]
        self.nodes.append(helper.make_node(kind, inputs, names, name=node, **attributes))
        return names[0] if len(names) == 1 else names

    def const(self, value):
        """A Constant node, as torch writes the small tensors of a graph."""
        value = np.asarray(value)
        if value.dtype == np.float64:
            value = value.astype(np.float32)
        tensor = numpy_helper.from_array(value)
        return self.op("Constant", value=tensor)

    def weight(self, value):
        name = f"model.w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def conv(self, x, w, b, stride=1, noise=0.002):
        w = np.asarray(w, np.float64)
        w = w + noise * np.abs(w).max() * self.rng.standard_normal(w.shape)
        pad = w.shape[-1] // 2
        return self.op("Conv", x, self.weight(w), self.weight(b), kernel_shape=list(w.shape[2:]),
                       strides=[stride] * 2, pads=[pad] * 4, dilations=[1, 1], group=1)

    def silu(self, x):
        return self.op("Mul", x, self.op("Sigmoid", x))

    def cbs(self, x, w, b=None, stride=1):
        w = np.asarray(w)
        return self.silu(self.conv(x, w, np.zeros(w.shape[0]) if b is None else b, stride))


def spread(matrix, kernel):
    """Outer product of a channel matrix [out, in] and a spatial kernel."""
    return np.asarray(matrix, float)[:, :, None, None] * np.asarray(kernel, float)[None, None]


HALVE = np.zeros((3, 3))
HALVE[1:, 1:] = 0.25  # mean of the two by two pixels that a cell covers
POINT = np.ones((1, 1))
BLUR = np.outer([1, 2, 1], [1, 2, 1]) / 16.0
EYE3, EYE6 = np.eye(3), np.eye(6)


def backbone(net, x, raw_bgr=False):
    """Three feature maps of six channels: patch masks and colour strengths."""
    strength = np.full((3, 3), -0.5) + 1.5 * np.eye(3)  # a channel minus the mean of the others
    if raw_bgr:
        strength = strength[:, ::-1] / 255.0
    first = STEEP * np.concatenate([strength] * 3)
    bias = -STEEP * np.repeat([0.15, 0.35, 0.05], 3)
    x = net.cbs(x, spread(first, HALVE), bias, 2)
    mask = np.concatenate([EYE3, -EYE3, 0 * EYE3], 1) / 0.2
    colour = np.concatenate([0 * EYE3, 0 * EYE3, EYE3], 1)
    x = net.cbs(x, spread(GAIN / STEEP * np.concatenate([mask, colour]), HALVE), None, 2)

    def c2f(x):
        y = net.cbs(x, spread(np.concatenate([EYE6, EYE6]), POINT))
        a, b = net.op("Split", y, np.array([6, 6]), outputs=2, axis=1)
        inner = net.cbs(net.cbs(b, spread(EYE6, BLUR)), spread(0.1 * EYE6, BLUR))
        c = net.op("Add", b, inner)
        y = net.op("Concat", a, b, c, axis=1)
        return net.cbs(y, spread(np.concatenate([0.4 * EYE6, 0.3 * EYE6, 0.28 * EYE6], 1), POINT))

    def up(x):
        return net.op("Resize", x, "", np.array([1, 1, 2, 2], np.float32), mode="nearest",
                      coordinate_transformation_mode="asymmetric", nearest_mode="floor",
                      cubic_coeff_a=-0.75)

    def join(fine, coarse):
        y = net.op("Concat", up(coarse), fine, axis=1)
        return net.cbs(y, spread(np.concatenate([0.06 * EYE6, 0.94 * EYE6], 1), POINT))

    p3 = c2f(net.cbs(x, spread(EYE6, HALVE), None, 2))
    p4 = c2f(net.cbs(p3, spread(EYE6, HALVE), None, 2))
    p5 = net.cbs(p4, spread(EYE6, HALVE), None, 2)
    n4 = join(p4, p5)
    n3 = join(p3, n4)
    return [n3, n4, p5]


def branches(net, feature):
    """Distances to the four sides and the response of each class, times GAIN."""
    sides = np.zeros((4, 6, 9, 9))  # left, top, right, bottom, in cells
    reach = np.array([1, 1, 1, 1, 0.5, 0, 0, 0, 0])
    across = np.array([0, 0, 0, 0.2, 0.6, 0.2, 0, 0, 0])
    sides[0, :3] = np.outer(across, reach)
    sides[1, :3] = np.outer(reach, across)
    sides[2, :3] = np.outer(across, reach[::-1])
    sides[3, :3] = np.outer(reach[::-1], across)
    ring = np.ones((7, 7))
    ring[1:-1, 1:-1] = 0
    kernel = -1.2 * ring / ring.sum()
    bell = np.exp(-np.arange(-2, 3) ** 2 / 4.5)
    kernel[1:6, 1:6] += np.outer(bell, bell) / bell.sum() ** 2
    response = spread(np.concatenate([0.8 * EYE3, 0.3 * EYE3], 1), kernel)
    return net.cbs(feature, sides, np.full(4, 0.15 * GAIN)), net.cbs(feature, response)


def class_logits(net, response):
    """A step at the bias, so that few scores are near the threshold, and a slope above it."""
    w = spread(np.concatenate([EYE3, EYE3]) * SHARP / GAIN, POINT)
    step = net.cbs(response, w, -SHARP * np.repeat([BIAS, BIAS + STEP], 3))
    rise = 4.5 / (SHARP * STEP)
    w = spread(np.concatenate([EYE3 * rise, EYE3 * (5.0 / SHARP - rise)], 1), POINT)
    return net.conv(step, w, np.full(3, -4.8))


def dfl_logits(net, sides):
    """Sixteen logits per side whose softmax has its mean near the distance.

    j*m/s2 - j*j/(2*s2) is a normal density around m, up to a constant.
    """
    j, s2 = np.arange(REG_MAX), 0.8
    w = np.zeros((4 * REG_MAX, 4))
    for k in range(4):
        w[k * REG_MAX:(k + 1) * REG_MAX, k] = j / s2 / GAIN
    return net.conv(sides, spread(w, POINT), np.tile(-j * j / (2 * s2), 4), noise=0)


def fixed_anchors(height, width):
    """Cell centres [2, A] in cells and strides [1, A], row by row."""
    points, strides = [], []
    for s in STRIDES:
        y, x = np.mgrid[0:height // s, 0:width // s]
        points.append(np.stack([x.ravel(), y.ravel()]) + 0.5)
        strides.append(np.full((1, x.size), s))
    return np.concatenate(points, 1), np.concatenate(strides, 1)


# --------------------------------------------------------------------- models


def yolov8_heads(net, x):
    heads = []
    for feature in backbone(net, x):
        sides, response = branches(net, feature)
        logits = class_logits(net, response)
        heads.append(net.op("Concat", dfl_logits(net, sides), logits, axis=1))
    return heads


def dfl(net, box, split_shape, flat_shape):
    y = net.op("Reshape", box, split_shape, allowzero=0)
    y = net.op("Softmax", net.op("Transpose", y, perm=[0, 2, 1, 3]), axis=1)
    w = net.weight(np.arange(REG_MAX).reshape(1, REG_MAX, 1, 1))
    y = net.op("Conv", y, w, kernel_shape=[1, 1], strides=[1, 1], pads=[0] * 4,
               dilations=[1, 1], group=1)
    return net.op("Reshape", y, flat_shape, allowzero=0)


def dist2bbox(net, near, far, anchors, strides, xywh=True):
    low, high = net.op("Sub", anchors, near), net.op("Add", anchors, far)
    if xywh:
        centre = net.op("Div", net.op("Add", low, high), 2.0)
        low, high = centre, net.op("Sub", high, low)
    return net.op("Mul", net.op("Concat", low, high, axis=1), strides)


def yolov8_dynamic(net):
    """All sizes symbolic: every shape is computed in the graph, as torch exports it."""

    def dim(x, axis):
        return net.op("Gather", net.op("Shape", x), np.int64(axis), axis=0)

    def shape(*parts):
        vectors = [net.op("Unsqueeze", p, np.array([0])) if isinstance(p, str)
                   else np.array([p], np.int64) for p in parts]
        return net.op("Concat", *vectors, axis=0)

    heads = yolov8_heads(net, "images")
    batch = dim(heads[0], 0)
    flat = [net.op("Reshape", h, shape(batch, 4 * REG_MAX + NC, -1), allowzero=0) for h in heads]
    joined = net.op("Concat", *flat, axis=2)

    points, strides = [], []
    for head, stride in zip(heads, STRIDES):
        rows, columns = dim(head, 2), dim(head, 3)
        steps = []
        for n in (columns, rows):
            n = net.op("Cast", n, to=TensorProto.FLOAT)
            steps.append(net.op("Add", net.op("Range", 0.0, n, 1.0), 0.5))
        grid = shape(rows, columns)
        xs = net.op("Expand", net.op("Reshape", steps[0], np.array([1, -1]), allowzero=0), grid)
        ys = net.op("Expand", net.op("Reshape", steps[1], np.array([-1, 1]), allowzero=0), grid)
        pair = net.op("Concat", net.op("Unsqueeze", xs, np.array([-1])),
                      net.op("Unsqueeze", ys, np.array([-1])), axis=-1)
        points.append(net.op("Reshape", pair, np.array([-1, 2]), allowzero=0))
        count = net.op("Mul", rows, columns)
        strides.append(net.op("Expand", float(stride), shape(count, 1)))
    anchors = net.op("Transpose", net.op("Concat", *points, axis=0), perm=[1, 0])
    strides = net.op("Transpose", net.op("Concat", *strides, axis=0), perm=[1, 0])
    anchors = net.op("Unsqueeze", anchors, np.array([0]))

    box, cls = net.op("Split", joined, np.array([4 * REG_MAX, NC]), outputs=2, axis=1)
    n, a = dim(box, 0), dim(box, 2)
    dist = dfl(net, box, shape(n, 4, REG_MAX, a), shape(n, 4, a))
    # chunk(2, dim=1) with the half computed from the shape
    half = net.op("Div", net.op("Add", dim(dist, 1), np.array([1])), np.array([2]))
    middle, end = net.op("Mul", half, np.array([1])), net.op("Mul", half, np.array([2]))
    near = net.op("Slice", dist, np.array([0]), middle, np.array([1]))
    far = net.op("Slice", dist, middle, end, np.array([1]))
    boxes = dist2bbox(net, near, far, anchors, strides)
    net.op("Concat", boxes, net.op("Sigmoid", cls), axis=1, name="output0")
    return [("output0", TensorProto.FLOAT, ["batch", 4 + NC, "anchors"])]


def yolov8_parts(net, size, xywh):
    """Boxes [1, 4, A] and class scores [1, nc, A] with fixed sizes."""
    heads = yolov8_heads(net, "images")
    channels = 4 * REG_MAX + NC
    flat = [net.op("Reshape", h, np.array([1, channels, -1]), allowzero=0) for h in heads]
    box, cls = net.op("Split", net.op("Concat", *flat, axis=2),
                      np.array([4 * REG_MAX, NC]), outputs=2, axis=1)
    points, strides = fixed_anchors(*size)
    a = strides.size
    dist = dfl(net, box, np.array([1, 4, REG_MAX, a]), np.array([1, 4, a]))
    near = net.op("Slice", dist, np.array([0]), np.array([2]), np.array([1]))
    far = net.op("Slice", dist, np.array([2]), np.array([4]), np.array([1]))
    boxes = dist2bbox(net, near, far, points[None].astype(np.float32),
                      strides.astype(np.float32), xywh)
    return boxes, net.op("Sigmoid", cls), a


def yolov8_fixed(net):
    boxes, scores, a = yolov8_parts(net, (256, 320), True)
    net.op("Concat", boxes, scores, axis=1, name="output0")
    return [("output0", TensorProto.FLOAT, [1, 4 + NC, a])]


def yolov5(net):
    """Three anchors per cell; xy = (2s - 0.5 + grid) * stride, wh = (2s)^2 * anchor."""
    shapes = np.array([[3.6, 3.6], [5.2, 4.0], [4.0, 5.2]])  # in cells
    rows, total = [], 0
    for feature, stride in zip(backbone(net, "images"), STRIDES):
        sides, response = branches(net, feature)
        # how much wider than high a patch is, and the reverse
        excess = np.array([[1, -1, 1, -1], [-1, 1, -1, 1]]) * 20.0 / GAIN
        shape = net.cbs(sides, spread(excess, POINT), np.full(2, -20.0))
        merged = net.op("Concat", sides, shape, class_logits(net, response), axis=1)
        w, b = np.zeros((3, 5 + NC, 9)), np.zeros((3, 5 + NC))
        for i, (aw, ah) in enumerate(shapes):
            # inputs: left, top, right, bottom, wider, higher, then the classes
            w[i, 0, [0, 2]], w[i, 1, [1, 3]] = (-1, 1), (-1, 1)
            w[i, 2, [0, 2]], b[i, 2] = 1 / aw, -1
            w[i, 3, [1, 3]], b[i, 3] = 1 / ah, -1
            w[i, :4, :4] /= GAIN
            w[i, 4, 4:6] = np.array([[-8, -8], [12, -8], [-8, 12]])[i] / 20.0
            b[i, 4] = (2.5, -5, -5)[i]
            w[i, 5:, 6:] = EYE3
        y = net.conv(merged, spread(w.reshape(-1, 9), POINT), b.reshape(-1))
        ny = nx = 320 // stride
        y = net.op("Reshape", y, np.array([1, 3, 5 + NC, ny, nx]), allowzero=0)
        y = net.op("Sigmoid", net.op("Transpose", y, perm=[0, 1, 3, 4, 2]))
        xy, wh, rest = net.op("Split", y, np.array([2, 2, 1 + NC]), outputs=3, axis=4)
        gy, gx = np.mgrid[0:ny, 0:nx]
        grid = np.broadcast_to(np.stack([gx, gy], -1) - 0.5, (1, 3, ny, nx, 2)).astype(np.float32)
        anchor = (shapes * stride).reshape(1, 3, 1, 1, 2).astype(np.float32)
        xy = net.op("Mul", net.op("Add", net.op("Mul", xy, 2.0), grid), float(stride))
        wh = net.op("Mul", net.op("Pow", net.op("Mul", wh, 2.0), 2.0), anchor)
        y = net.op("Concat", xy, wh, rest, axis=4)
        rows.append(net.op("Reshape", y, np.array([1, 3 * ny * nx, 5 + NC]), allowzero=0))
        total += 3 * ny * nx
    net.op("Concat", *rows, axis=1, name="output0")
    return [("output0", TensorProto.FLOAT, [1, total, 5 + NC])]


def yolox(net):
    """Raw boxes: offsets from the cell's corner and logarithms, in cells."""
    rows, total = [], 0
    typical = 4.0
    for feature, stride in zip(backbone(net, "images", raw_bgr=True), STRIDES):
        sides, response = branches(net, feature)
        w = np.array([[-.5, 0, .5, 0], [0, -.5, 0, .5],
                      [1 / typical, 0, 1 / typical, 0], [0, 1 / typical, 0, 1 / typical]])
        b = np.array([.5, .5, math.log(typical) - 1, math.log(typical) - 1])
        reg = net.conv(sides, spread(w / GAIN, POINT), b)
        obj = net.conv(response, spread(np.full((1, 3), 6 / GAIN), POINT), [-0.5])
        cls = class_logits(net, response)
        y = net.op("Concat", reg, net.op("Sigmoid", obj), net.op("Sigmoid", cls), axis=1)
        rows.append(net.op("Reshape", y, np.array([1, 5 + NC, -1]), allowzero=0))
        total += (320 // stride) ** 2
    net.op("Transpose", net.op("Concat", *rows, axis=2), perm=[0, 2, 1], name="output")
    return [("output", TensorProto.FLOAT, [1, total, 5 + NC])]


def best_rows(net, *names, keep=100):
    """Peaks of each class, then the best of all, as YOLOv10 selects them."""
    boxes, scores, _ = yolov8_parts(net, (320, 320), False)
    peaks, begin = [], 0
    for s in STRIDES:
        n = 320 // s
        part = net.op("Slice", scores, np.array([begin]), np.array([begin + n * n]), np.array([2]))
        part = net.op("Reshape", part, np.array([1, NC, n, n]), allowzero=0)
        top = net.op("MaxPool", part, kernel_shape=[5, 5], strides=[1, 1], pads=[2] * 4)
        peak = net.op("Cast", net.op("Equal", part, top), to=TensorProto.FLOAT)
        part = net.op("Mul", part, peak)
        peaks.append(net.op("Reshape", part, np.array([1, NC, n * n]), allowzero=0))
        begin += n * n
    scores = net.op("Transpose", net.op("Concat", *peaks, axis=2), perm=[0, 2, 1])
    boxes = net.op("Transpose", boxes, perm=[0, 2, 1])

    def wide(index, width):
        return net.op("Tile", net.op("Unsqueeze", index, np.array([2])), np.array([1, 1, width]))

    best = net.op("ReduceMax", scores, axes=[2], keepdims=0)
    _, index = net.op("TopK", best, np.array([keep]), outputs=2, axis=1, largest=1, sorted=1)
    boxes = net.op("GatherElements", boxes, wide(index, 4), axis=1)
    scores = net.op("GatherElements", scores, wide(index, NC), axis=1)
    scores = net.op("Reshape", scores, np.array([1, keep * NC]), allowzero=0)
    scores, index = net.op("TopK", scores, np.array([keep]), outputs=2, axis=1, largest=1,
                           sorted=1, name=(names[1], "index"))
    labels = net.op("Mod", index, np.array(NC), name=names[2])
    boxes = net.op("GatherElements", boxes, wide(net.op("Div", index, np.array(NC)), 4), axis=1,
                   name=names[0])
    return boxes, scores, labels


def end2end(net):
    boxes, scores, labels = best_rows(net, "rows", "picked", "classes")
    labels = net.op("Cast", labels, to=TensorProto.FLOAT)
    columns = [net.op("Unsqueeze", v, np.array([2])) for v in (scores, labels)]
    net.op("Concat", boxes, *columns, axis=2, name="output0")
    return [("output0", TensorProto.FLOAT, [1, 100, 6])]


def end2end_split(net):
    best_rows(net, "boxes", "scores", "labels")
    return [("boxes", TensorProto.FLOAT, [1, 100, 4]), ("scores", TensorProto.FLOAT, [1, 100]),
            ("labels", TensorProto.INT64, [1, 100])]


MODELS = [  # file, decoder, builder, input height and width
    ("yolov8-dynamic.onnx", "yolov8", yolov8_dynamic, (320, 320)),
    ("yolov8-fixed.onnx", "yolov8", yolov8_fixed, (256, 320)),
    ("yolov5.onnx", "yolov5", yolov5, (320, 320)),
    ("yolox.onnx", "yolox", yolox, (320, 320)),
    ("end2end.onnx", "end2end", end2end, (320, 320)),
    ("end2end-split.onnx", "end2end", end2end_split, (320, 320)),
]


def name_dimensions(model):
    """Gives every symbolic intermediate size its own name.

    The torch exporter does the same: one size has different names in different
    tensors, so a parser must not infer equality from the names.
    """
    for info in model.graph.value_info:
        for i, d in enumerate(info.type.tensor_type.shape.dim):
            if not d.HasField("dim_value") and (not d.dim_param or d.dim_param.startswith("unk__")):
                d.dim_param = f"{info.name.rsplit('/', 1)[-1].replace('_output_0', '')}_dim_{i}"


def build(entry, seed):
    file, _, builder, (height, width) = entry
    dynamic = builder is yolov8_dynamic
    net = Net(seed)
    outputs = builder(net)
    dims = ["batch", 3, "height", "width"] if dynamic else [1, 3, height, width]
    graph = helper.make_graph(
        net.nodes, "main_graph" if builder is not yolox else "torch_jit",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info(*o) for o in outputs], net.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)],
                              producer_name="pytorch", producer_version="2.2.0", ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    if dynamic:
        name_dimensions(model)
    if builder is not yolox:
        helper.set_model_props(model, {
            "description": "Ultralytics YOLO model for detect_reference", "author": "Ultralytics",
            "version": "8.2.0", "date": "2024-05-01T12:00:00", "task": "detect", "stride": "32",
            "batch": "1", "imgsz": f"[{height}, {width}]",
            "names": "{" + ", ".join(f"{i}: '{n}'" for i, n in enumerate(LABELS)) + "}"})
    onnx.checker.check_model(model, full_check=True)
    return model


# --------------------------------------------------------------------- images

RED, GREEN, BLUE = (226, 34, 40), (30, 205, 48), (38, 44, 228)
DULL_RED, DULL_GREEN, DULL_BLUE = (196, 52, 50), (58, 184, 60), (60, 60, 190)

# Shapes in units of 1/320 of the longer side: kind, x0, y0, x1, y1, colours.
# "across" and "down" are rectangles of two colours side by side or stacked.
IMAGES = {
    "a.png": (640, 480, [
        ("across", 25, 22, 78, 55, RED, BLUE),
        ("oval", 123, 25, 163, 68, GREEN),
        ("oval", 195, 13, 283, 93, RED),
        ("box", 284, 116, 320, 162, GREEN),
        ("oval", 40, 93, 165, 213, BLUE),
        ("down", 201, 118, 232, 168, DULL_GREEN, BLUE),
        ("box", 229, 203, 270, 240, DULL_RED)]),
    "b.png": (500, 700, [
        ("oval", 20, 12, 59, 55, DULL_BLUE),
        ("across", 89, 22, 152, 61, GREEN, RED),
        ("box", 0, 84, 34, 125, RED),
        ("oval", 95, 93, 185, 176, GREEN),
        ("oval", 28, 188, 69, 227, RED),
        ("oval", 50, 194, 96, 240, RED),
        ("down", 148, 206, 186, 264, BLUE, RED),
        ("box", 62, 281, 107, 320, DULL_GREEN)]),
    "c.png": (1280, 360, [
        ("box", 0, 19, 38, 58, BLUE),
        ("across", 61, 12, 120, 51, RED, GREEN),
        ("oval", 134, 2, 216, 85, BLUE),
        ("oval", 233, 10, 272, 50, DULL_RED),
        ("box", 283, 51, 320, 90, GREEN)]),
    "d.png": (240, 200, [
        ("oval", 14, 19, 148, 150, RED),
        ("across", 191, 23, 299, 98, GREEN, BLUE),
        ("oval", 174, 124, 216, 162, BLUE),
        ("box", 279, 151, 320, 189, DULL_RED),
        ("oval", 62, 185, 135, 266, GREEN)]),
}


def draw(name):
    """Coloured patches on grey, both with a coarse and a fine texture."""
    width, height, shapes = IMAGES[name]
    unit = max(width, height) / 320.0
    rng = np.random.default_rng(1000 + ord(name[0]))
    coarse = rng.integers(104, 136, (height // 24 + 2, width // 24 + 2)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.BILINEAR).convert("RGB")
    pen = ImageDraw.Draw(image)
    for kind, x0, y0, x1, y1, *colours in shapes:
        x0, y0, x1, y1 = (int(round(v * unit)) for v in (x0, y0, x1, y1))
        if kind == "oval":
            pen.ellipse([x0, y0, x1 - 1, y1 - 1], fill=colours[0])
            continue
        pen.rectangle([x0, y0, x1 - 1, y1 - 1], fill=colours[-1])
        if kind == "across":
            pen.rectangle([x0, y0, (x0 + x1) // 2 - 1, y1 - 1], fill=colours[0])
        elif kind == "down":
            pen.rectangle([x0, y0, x1 - 1, (y0 + y1) // 2 - 1], fill=colours[0])
    pixels = np.asarray(image).astype(np.int16)
    pixels = pixels + rng.integers(-9, 10, (height, width, 1)) + rng.integers(-3, 4, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


# ------------------------------------------------------------- reference path


def letterbox(image, size):
    """Pixels [H, W, 3], and the inverse mapping: scale, left, top."""
    (height, width), (w, h) = size, image.size
    r = min(width / w, height / h)
    nw, nh = round(w * r), round(h * r)
    left, top = (width - nw) // 2, (height - nh) // 2
    canvas = np.full((height, width, 3), 114, np.uint8)
    canvas[top:top + nh, left:left + nw] = np.asarray(image.resize((nw, nh), Image.BILINEAR))
    return canvas, (r, left, top)


def decode(decoder, outputs, size):
    """Corner boxes in input pixels, scores, classes, and the lead over the next class."""
    if decoder == "end2end":
        if len(outputs) == 1:
            rows = outputs["output0"][0].astype(np.float64)
            return rows[:, :4], rows[:, 4], rows[:, 5].astype(int), None
        return (outputs["boxes"][0].astype(np.float64), outputs["scores"][0].astype(np.float64),
                outputs["labels"][0], None)
    rows = next(iter(outputs.values()))[0].astype(np.float64)
    if decoder == "yolov8":
        rows = rows.T
        centre, extent, classes = rows[:, :2], rows[:, 2:4], rows[:, 4:]
    else:
        centre, extent, classes = rows[:, :2], rows[:, 2:4], rows[:, 4:5] * rows[:, 5:]
    if decoder == "yolox":
        points, strides = fixed_anchors(*size)
        centre = (centre + points.T - 0.5) * strides.T
        extent = np.exp(extent) * strides.T
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], 1)
    ordered = np.sort(classes, 1)
    return boxes, ordered[:, -1], classes.argmax(1), ordered[:, -1] - ordered[:, -2]


def overlap(box, others):
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[2:], others[:, 2:])
    inner = np.clip(high - low, 0, None).prod(1)
    area = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1)
    return inner / np.maximum(area - inner, 1e-9)


def suppress(boxes, scores, classes):
    """Greedy suppression per class: the kept indices, and the smallest margins of the decisions."""
    kept, limit_gap, win_gap = [], 1.0, 1.0
    for i in np.argsort(-scores, kind="stable"):
        rivals = np.array([k for k in kept if classes[k] == classes[i]], int)
        ious = overlap(boxes[i], boxes[rivals]) if len(rivals) else np.zeros(0)
        if len(ious):
            limit_gap = min(limit_gap, abs(ious.max() - IOU))
        over = ious > IOU
        if not over.any():
            kept.append(i)
            continue
        differs = over & (ious < 0.97)
        if differs.any():
            win_gap = min(win_gap, (scores[rivals[differs]] - scores[i]).min())
    return np.array(kept[:TOP_K], int), limit_gap, win_gap


def detect(session, entry, pixels, back, source):
    """The pipeline after the letterbox: detections, and the margins of its decisions."""
    _, decoder, builder, size = entry
    x = pixels.astype(np.float32)
    x = x[:, :, ::-1] if builder is yolox else x / np.float32(255)
    x = np.ascontiguousarray(x.transpose(2, 0, 1)[None])
    names = [o.name for o in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {"images": x})))
    boxes, scores, classes, lead = decode(decoder, outputs, size)
    facts = {"threshold": np.abs(scores - THRESHOLD).min(), "limit": 1.0, "win": 1.0, "class": 1.0}
    above = scores >= THRESHOLD
    boxes, scores, classes = boxes[above], scores[above], classes[above]
    facts["before"] = len(scores)

    r, left, top = back
    placed = (boxes - np.array([left, top, left, top])) / r
    w, h = source
    clipped = np.clip(placed, 0, np.array([w, h, w, h], float))
    if decoder == "end2end":
        kept = np.argsort(-scores, kind="stable")
    else:
        facts["class"] = lead[above].min(initial=1.0)
        kept, facts["limit"], facts["win"] = suppress(placed, scores, classes)
        other, limit, win = suppress(clipped, scores, classes)
        facts["limit"], facts["win"] = min(facts["limit"], limit), min(facts["win"], win)
        facts["clip first"] = sorted(kept) == sorted(other)
    facts["inside"] = bool(((placed[kept] > 4) & (placed[kept] < np.array([w, h, w, h]) - 4)).all(1).any())
    return clipped[kept], scores[kept], classes[kept], facts


def same_set(first, second):
    """Whether both have the same classes at the same places, in any order."""
    (boxes, _, classes, _), (others, _, kinds, _) = first, second
    if len(boxes) != len(others):
        return False
    free = list(range(len(others)))
    for box, cls in zip(boxes, classes):
        fits = [j for j in free if kinds[j] == cls and overlap(box, others[j:j + 1])[0] > 0.97]
        if not fits:
            return False
        free.remove(max(fits, key=lambda j: overlap(box, others[j:j + 1])[0]))
    return True


def perturbed(pixels):
    """Variants in which every pixel changes by at most one grey level."""
    rng = np.random.default_rng(77)
    moves = [rng.choice([-1, 1], pixels.shape) for _ in range(3)]
    moves += [rng.integers(-1, 2, pixels.shape)]
    moves += [np.array(v) for v in ([1, 1, 1], [-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1])]
    for move in moves:
        yield np.clip(pixels.astype(np.int16) + move, 0, 255).astype(np.uint8)


def violations(session, entry, results, prepared):
    """The conditions of the module docstring that a model's results violate."""
    found = []
    nms = entry[1] != "end2end"
    crossing = edge = inside = False
    for name, (boxes, scores, classes, facts) in results.items():
        w, h = IMAGES[name][:2]

        def need(holds, what):
            if not holds:
                found.append(f"{name}: {what}")

        need(facts["threshold"] >= 0.01, f"score {facts['threshold']:.4f} from the threshold")
        need(facts["limit"] >= 0.02, f"overlap {facts['limit']:.3f} from the limit")
        need(facts["win"] >= 0.002, f"won by {facts['win']:.4f}")
        need(facts["class"] >= 0.03, f"class won by {facts['class']:.3f}")
        need(facts.get("clip first", True), "clipping first changes the outcome")
        need(5 <= facts["before"] <= 60, f"{facts['before']} candidates")
        need(len(boxes) >= 3 and len(set(classes)) >= 2, f"{len(boxes)} left")
        need(not nms or len(boxes) < facts["before"], "nothing to suppress")
        edge |= bool(((boxes[:, :2] == 0).any(1) | (boxes[:, 2:] == [w, h]).any(1)).any())
        inside |= facts["inside"]
        for i, box in enumerate(boxes):
            crossing |= bool((overlap(box, boxes[classes != classes[i]]) > IOU + 0.02).any())
        for k, moved in enumerate(perturbed(prepared[name][0])):
            again = detect(session, entry, moved, prepared[name][1], (w, h))
            need(same_set((boxes, scores, classes, facts), again), f"changes under move {k}")
    for holds, what in ((edge, "no box at the edge"), (inside, "no box inside"),
                        (crossing, "no overlap of two classes")):
        if not holds:
            found.append(what)
    return found


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    images = {}
    for name in IMAGES:
        draw(name).save(os.path.join(folder, name))
        images[name] = Image.open(os.path.join(folder, name)).convert("RGB")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    entries = []
    for number, entry in enumerate(MODELS):
        file, decoder, builder, size = entry
        started = time.monotonic()
        prepared = {name: letterbox(p, size) for name, p in images.items()}
        data = build(entry, 20 + number).SerializeToString()
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        results = {name: detect(session, entry, pixels, back, images[name].size)
                   for name, (pixels, back) in prepared.items()}
        problems = violations(session, entry, results, prepared)
        if problems:
            sys.exit(f"{file}: the detections are not robust: " + "; ".join(problems))
        with open(os.path.join(folder, file), "wb") as out:
            out.write(data)
        scale = 1 if builder is yolox else 255
        entries.append({
            "file": file, "decoder": decoder, "labels": LABELS, "input": list(size),
            "color": "bgr" if builder is yolox else "rgb", "mean": [0, 0, 0], "std": [scale] * 3,
            "threshold": THRESHOLD, "iou": IOU, "top_k": TOP_K,
            "images": {name: [
                {"label": LABELS[c], "class": int(c), "score": round(float(s), 5),
                 "box": [round(float(v), 3) for v in b]}
                for b, s, c in zip(boxes, scores, classes)]
                for name, (boxes, scores, classes, _) in results.items()}})
        counts = " ".join(f"{n}:{f['before']}->{len(b)}" for n, (b, _, _, f) in results.items())
        print(f"{file}: {len(data)} bytes, candidates->kept {counts}, "
              f"{time.monotonic() - started:.1f} s", file=sys.stderr)
    with open(os.path.join(folder, "expected.json"), "w", encoding="utf-8") as out:
        json.dump({"models": entries}, out, indent=1)
        out.write("\n")


if __name__ == "__main__":
    main()
