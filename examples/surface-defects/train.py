"""Draws pictures of metal parts, trains a small classifier on them, and exports it as ONNX.

This script creates all data files in this folder from a seed. It draws brushed-metal plates on a conveyor belt as
seen by a camera above the belt, of four classes: good, scratch, dent, stain. It converts each picture to the model's
input exactly as Lineside does at run time (JPEG, centre crop, resize, divide by 255), trains a small convolutional
network, evaluates it on held-out pictures, and exits with status 1 if fewer than 97 % of those are classified
correctly. It writes:

    surface-defects.onnx   the model, with its class names in the metadata
    frames/                40 pictures in play order, as a camera would deliver them
    golden/                one picture per class, with the output that ONNX Runtime computes for it
    report.json            seed, counts, accuracy, confusion matrix, size and digest of the model

Usage:

    python -m venv .venv
    .venv/bin/pip install -r requirements.txt
    .venv/bin/python train.py                # writes to the folder of this script
    .venv/bin/python train.py --out DIR      # writes to another folder

It takes about 10 minutes on two processor cores and requires no GPU. On one machine the same seed gives the same
pictures and weights. On another processor the last bits of the weights may differ, because compilers order floating-
point sums differently, and then the digest of the model differs as well.
"""

import argparse
import ast
import concurrent.futures
import hashlib
import io
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import sys
import time

# One thread per process for linear algebra and XLA, so that the order of floating-point sums is fixed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# ---------------------------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------------------------

CLASSES = ["good", "scratch", "dent", "stain"]  # In the order of the model's outputs.
DEFAULT_SEED = 20240417  # Any integer; determines all random numbers.

# The camera.
FRAME_WIDTH = 640  # pixels
FRAME_HEIGHT = 480  # pixels
JPEG_QUALITY = 85  # Pillow's scale, 1 to 95
MODEL_SIDE = 128  # pixels, width and height of the model's input

# The pictures.
TRAIN_COUNT = 5200  # pictures, an equal share per class
HELD_OUT_COUNT = 1200  # pictures, an equal share per class
FRAME_SHARES = [22, 6, 6, 6]  # pictures in frames/, per class: 55 % good and 15 % of each defect
FRAMES_BYTES_LIMIT = 1_900_000  # bytes, all of frames/ together
SPLITS = {"train": 0, "held-out": 1, "frames": 2, "golden": 3}  # Each split has its own random streams.
RENDER_CHUNK = 50  # pictures per task handed to a drawing process

# The part.
PLATE_HALF_WIDTH = 196.0  # pixels
PLATE_HALF_HEIGHT = 176.0  # pixels
PLATE_CORNER = 22.0  # pixels, radius of the plate's corners
PLATE_SHIFT = 10.0  # pixels, largest shift in x and in y
PLATE_TURN = 5.0  # degrees, largest rotation either way
PLATE_SCALE = 0.05  # fraction, largest change of size either way
CHAMFER = 6.0  # pixels, width of the bevelled edge
HOLE_INSET = 27.0  # pixels, from the edges of the plate to the centre of a hole
HOLE_RADIUS = 9.5  # pixels
DEFECT_MARGIN = 26.0  # pixels, least distance from the end of a scratch or the centre of a defect to the plate's edge
SCRATCH_FROM_GRAIN = 14.0  # degrees, least angle to the grain; a scratch along the grain is invisible
TEXTURE_SIDE = 1024  # pixels, side of the noise pictures from which grain, clouds and belt are cut

# The network: (output channels, stride) of each 3x3 convolution.
LAYERS = [(16, 2), (20, 2), (32, 2), (40, 2), (64, 1)]
CELLS = MODEL_SIDE // math.prod(stride for _, stride in LAYERS)  # cells, side of the network's last feature map
KERNEL = 3  # pixels, side of every convolution kernel
PATCH = 4  # cells, side of the max-pooling patches of the last feature map

# Training.
TOUCHED_FLOOR = 0.03  # fraction of full brightness; a pixel that a defect changes by more counts as touched
CELL_SHARE = 0.015  # fraction of touched pixels from which a cell has the class of the defect
CELL_LOSS = 1.0  # weight of the loss per cell, relative to the loss for the whole picture
DEFECT_CELL_WEIGHT = 6.0  # weight of a cell with a defect, relative to the more frequent cells without one
EPOCHS = 16  # passes over the training pictures
BATCH = 32  # pictures per step
LEARNING_RATE = 3e-3  # Adam, at its peak
WARM_UP = 0.05  # fraction of all steps over which the rate rises to its peak; it then falls as a cosine to zero
WEIGHT_DECAY = 1e-4  # per step, times the learning rate, on kernels only
RUNNING_SHARE = 0.98  # fraction of the running means and variances that a step keeps
NORMALISATION_FLOOR = 1e-5  # added to a variance before the square root
GAIN_JITTER = 0.12  # fraction, largest additional change of brightness either way
EVALUATION_BATCH = 200  # pictures

# Requirements.
ACCURACY_FLOOR = 0.97  # fraction of held-out pictures that must be classified correctly
MODEL_BYTES_LIMIT = 500_000  # bytes
LOGIT_TOLERANCE = 1e-3  # largest difference between a logit by jax and by ONNX Runtime
ONNX_OPSET = 17
ONNX_IR_VERSION = 8


def log(message):
    """Prints a progress message to stderr."""
    print(message, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def coloured_noise(rng, sigma_x, sigma_y):
    """Returns a square, seamlessly tiling picture of Gaussian noise, blurred by so many pixels, with unit deviation."""
    spectrum = np.fft.rfft2(rng.standard_normal((TEXTURE_SIDE, TEXTURE_SIDE)))
    fy = np.fft.fftfreq(TEXTURE_SIDE)[:, None]
    fx = np.fft.rfftfreq(TEXTURE_SIDE)[None, :]
    spectrum *= np.exp(-2.0 * math.pi**2 * ((fx * sigma_x) ** 2 + (fy * sigma_y) ** 2))
    noise = np.fft.irfft2(spectrum, s=(TEXTURE_SIDE, TEXTURE_SIDE))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


class Textures:
    """The noise pictures of one split. Every split has its own, so that no test picture shares grain with training."""

    def __init__(self, seed, split):
        rng = np.random.default_rng([seed, SPLITS[split], 0])
        grain = (
            0.75 * coloured_noise(rng, 70.0, 0.7)
            + 0.50 * coloured_noise(rng, 22.0, 0.5)
            + 0.30 * coloured_noise(rng, 130.0, 2.2)
        )
        self.grain = Image.fromarray(grain / grain.std())
        self.cloud = coloured_noise(rng, 14.0, 14.0)
        self.haze = coloured_noise(rng, 60.0, 60.0)
        self.rubber = coloured_noise(rng, 0.9, 0.9)
        self.wear = coloured_noise(rng, 9.0, 90.0)

    def cut(self, rng, noise):
        """Returns a frame-sized piece of a noise picture, from a random place and randomly mirrored."""
        y = rng.integers(0, TEXTURE_SIDE - FRAME_HEIGHT)
        x = rng.integers(0, TEXTURE_SIDE - FRAME_WIDTH)
        piece = noise[y : y + FRAME_HEIGHT, x : x + FRAME_WIDTH]
        return piece[:: 1 if rng.random() < 0.5 else -1, :: 1 if rng.random() < 0.5 else -1]


_Y, _X = np.mgrid[0:FRAME_HEIGHT, 0:FRAME_WIDTH].astype(np.float32)  # pixels
_CENTRE_X = (FRAME_WIDTH - 1) / 2  # pixels
_CENTRE_Y = (FRAME_HEIGHT - 1) / 2  # pixels
_CORNER_DISTANCE = ((_X - _CENTRE_X) ** 2 + (_Y - _CENTRE_Y) ** 2) / (_CENTRE_X**2 + _CENTRE_Y**2)
_STAMP_WIDTH, _STAMP_HEIGHT = 150, 30  # pixels, the field of the laser-marked serial number
_FONT = ImageFont.load_default(size=17)


class Part:
    """One plate: where it lies, and the coordinates (u, v) of every pixel of the frame in the plate's own axes."""

    def __init__(self, rng):
        self.cx = _CENTRE_X + rng.uniform(-PLATE_SHIFT, PLATE_SHIFT)
        self.cy = _CENTRE_Y + rng.uniform(-PLATE_SHIFT, PLATE_SHIFT)
        self.angle = math.radians(rng.uniform(-PLATE_TURN, PLATE_TURN))
        self.scale = 1.0 + rng.uniform(-PLATE_SCALE, PLATE_SCALE)
        self.cos, self.sin = math.cos(self.angle), math.sin(self.angle)
        dx, dy = _X - np.float32(self.cx), _Y - np.float32(self.cy)
        self.u = (dx * self.cos + dy * self.sin) / np.float32(self.scale)
        self.v = (dy * self.cos - dx * self.sin) / np.float32(self.scale)
        # Direction from the plate to the lamp, in the plane of the picture: approximately upper left.
        lamp = math.radians(rng.uniform(200.0, 250.0)) - self.angle
        self.lamp = (math.cos(lamp), math.sin(lamp))

    def outline(self, shift_u=0.0, shift_v=0.0):
        """Returns the signed distance to the plate's edge, negative inside, and its two components."""
        qu = np.abs(self.u - np.float32(shift_u)) - np.float32(PLATE_HALF_WIDTH - PLATE_CORNER)
        qv = np.abs(self.v - np.float32(shift_v)) - np.float32(PLATE_HALF_HEIGHT - PLATE_CORNER)
        outside = np.hypot(np.maximum(qu, 0), np.maximum(qv, 0))
        return outside + np.minimum(np.maximum(qu, qv), 0) - np.float32(PLATE_CORNER), qu, qv

    def warp(self, picture, offset_u, offset_v):
        """Returns the frame that shows `picture`, laid in the plate's axes with (0, 0) at the given offset in it."""
        c, s, k = self.cos, self.sin, 1.0 / self.scale
        matrix = (
            c * k, s * k, offset_u - (c * self.cx + s * self.cy) * k,
            -s * k, c * k, offset_v - (c * self.cy - s * self.cx) * k,
        )  # fmt: skip
        size = (FRAME_WIDTH, FRAME_HEIGHT)
        return np.asarray(picture.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))

    def window(self, u, v, radius):
        """Returns the slices of the frame that hold everything within `radius` of the plate's point (u, v)."""
        x = self.cx + (u * self.cos - v * self.sin) * self.scale
        y = self.cy + (u * self.sin + v * self.cos) * self.scale
        r = radius * self.scale + 2.0
        rows = slice(max(0, int(y - r)), min(FRAME_HEIGHT, int(y + r) + 1))
        columns = slice(max(0, int(x - r)), min(FRAME_WIDTH, int(x + r) + 1))
        return rows, columns

    def place(self, rng, margin):
        """Returns a random point (u, v) of the plate with a margin to the edges and to the holes in the corners."""
        while True:
            u = rng.uniform(-1, 1) * (PLATE_HALF_WIDTH - margin)
            v = rng.uniform(-1, 1) * (PLATE_HALF_HEIGHT - margin)
            to_hole = math.hypot(
                abs(u) - (PLATE_HALF_WIDTH - HOLE_INSET), abs(v) - (PLATE_HALF_HEIGHT - HOLE_INSET)
            )
            if to_hole > HOLE_RADIUS + margin:
                return u, v


def draw_belt(rng, textures):
    """Returns the brightness, 0 to 1, of a ribbed rubber conveyor belt that runs from left to right."""
    base = rng.uniform(0.13, 0.20)
    pitch = rng.uniform(26.0, 30.0)  # pixels between two ribs
    phase = (_X[0] + rng.uniform(0, pitch) + 0.6 * np.sin(_X[0] * 0.05)) / pitch * (2 * math.pi)
    ribs = 0.022 * np.tanh(3.0 * np.sin(phase)) + 0.012 * np.cos(phase)
    weave = 0.008 * np.sin(_Y[:, :1] * (2 * math.pi / 7.0) + rng.uniform(0, 6.28))
    belt = base + ribs[None, :].astype(np.float32) + weave
    belt = belt + 0.014 * textures.cut(rng, textures.rubber) + 0.016 * textures.cut(rng, textures.cloud)
    return belt + 0.012 * textures.cut(rng, textures.wear)


def draw_plate(rng, textures, part):
    """Returns the brightness, 0 to 1, of a sound plate: grain, reflection of the lamp, marking, holes and bevel."""
    base = rng.uniform(0.50, 0.64)
    # Brushed metal spreads the lamp's reflection across the grain: a broad bright band and a fainter one.
    light = np.float32(base) * (1.0 + rng.uniform(-0.09, 0.09) * part.u / 200 + rng.uniform(-0.09, 0.09) * part.v / 200)
    for strength, width in ((rng.uniform(0.06, 0.20), rng.uniform(70, 130)), (rng.uniform(0.0, 0.10), 45.0)):
        centre = rng.uniform(-190, 190)
        lean = rng.uniform(-0.25, 0.25)
        light = light * (1.0 + strength * np.exp(-(((part.u - centre - lean * part.v) / width) ** 2)))
    # The texture is wider than the plate by this much, so that grain can be cut from anywhere in it.
    slack = TEXTURE_SIDE / 2 - 250.0
    grain = part.warp(
        textures.grain,
        TEXTURE_SIDE / 2 + rng.uniform(-slack, slack),
        TEXTURE_SIDE / 2 + rng.uniform(-slack, slack),
    )
    grain = rng.uniform(0.022, 0.042) * grain
    haze = rng.uniform(0.0, 0.022) * textures.cut(rng, textures.haze)
    plate = light * (1.0 + grain + haze)

    # Harmless specks of dust, too small to be a defect.
    for _ in range(rng.poisson(5)):
        u, v = part.place(rng, 12.0)
        win = part.window(u, v, 4.0)
        r2 = (part.u[win] - u) ** 2 + (part.v[win] - v) ** 2
        plate[win] *= 1.0 + rng.uniform(-0.30, 0.15) * np.exp(-r2 / rng.uniform(0.6, 2.0))

    # The serial number that a laser has marked below the middle.
    stamp = Image.new("L", (_STAMP_WIDTH + 8, _STAMP_HEIGHT + 8))
    text = f"LS-{rng.integers(100, 999)}-{rng.integers(10000, 99999)}"
    ImageDraw.Draw(stamp).text((_STAMP_WIDTH / 2 + 4, _STAMP_HEIGHT / 2 + 4), text, fill=255, font=_FONT, anchor="mm")
    marked = part.warp(stamp, _STAMP_WIDTH / 2 + 4, _STAMP_HEIGHT / 2 + 4 - (PLATE_HALF_HEIGHT - 30.0))
    plate *= 1.0 - np.float32(rng.uniform(0.30, 0.45) / 255.0) * marked

    # Four holes with a countersink, dark inside.
    hu = np.abs(part.u) - np.float32(PLATE_HALF_WIDTH - HOLE_INSET)
    hv = np.abs(part.v) - np.float32(PLATE_HALF_HEIGHT - HOLE_INSET)
    from_hole = np.hypot(hu, hv)
    facing = (hu * np.sign(part.u) * part.lamp[0] + hv * np.sign(part.v) * part.lamp[1]) / (from_hole + 1e-3)
    ring = np.clip(HOLE_RADIUS + 4.5 - from_hole, 0, 1) * np.clip(from_hole - HOLE_RADIUS + 0.5, 0, 1)
    plate *= 1.0 - 0.38 * ring * facing - 0.06 * ring
    inside = np.clip(HOLE_RADIUS + 0.5 - from_hole, 0, 1)
    plate += inside * (0.075 - 0.03 * facing - plate)

    # The bevelled edge: bright where it faces the lamp, dark where it does not.
    distance, qu, qv = part.outline()
    across = np.where(qu > qv, np.sign(part.u) * part.lamp[0], np.sign(part.v) * part.lamp[1])
    bevel = np.clip((distance + CHAMFER) / 1.5, 0, 1)
    plate *= 1.0 + bevel * (0.34 * across - 0.04)
    return plate, distance


def add_scratch(rng, textures, part, plate):
    """Cuts one to three scratches into the plate: thin, slightly bent grooves with a bright and a dark flank."""
    length = rng.uniform(75.0, 250.0)
    while True:
        u0, v0 = part.place(rng, DEFECT_MARGIN)
        heading = rng.uniform(SCRATCH_FROM_GRAIN, 180.0 - SCRATCH_FROM_GRAIN)
        heading = math.radians(heading + (180.0 if rng.random() < 0.5 else 0.0))
        u1, v1 = u0 + length * math.cos(heading), v0 + length * math.sin(heading)
        if abs(u1) < PLATE_HALF_WIDTH - DEFECT_MARGIN and abs(v1) < PLATE_HALF_HEIGHT - DEFECT_MARGIN:
            break
    across = (-math.sin(heading), math.cos(heading))
    bend = rng.normal(0, 0.06) * length
    wobble, wobbles = rng.normal(0, 0.6), rng.uniform(1.5, 4.0)
    contrast = rng.uniform(0.50, 1.00)
    rough = textures.cut(rng, textures.rubber)
    strokes = 1 if rng.random() < 0.62 else int(rng.integers(2, 4))
    for stroke in range(strokes):
        # A further stroke runs beside the first, starts later or ends sooner, and is fainter.
        begin, end = (0.0, 1.0) if stroke == 0 else (rng.uniform(0, 0.4), rng.uniform(0.6, 1.0))
        aside = 0.0 if stroke == 0 else rng.uniform(5.0, 13.0) * (1 if stroke == 1 else -1)
        depth = contrast * (1.0 if stroke == 0 else rng.uniform(0.5, 0.95))
        half_width = rng.uniform(1.35, 2.5)  # pixels
        t = np.linspace(begin, end, 22)
        off = aside + bend * 4 * t * (1 - t) + wobble * np.sin(t * wobbles * 2 * math.pi)
        pu = (u0 + t * (u1 - u0) + off * across[0]).astype(np.float32)
        pv = (v0 + t * (v1 - v0) + off * across[1]).astype(np.float32)
        win = part.window((pu[0] + pu[-1]) / 2, (pv[0] + pv[-1]) / 2, length / 2 + abs(bend) + 16.0)
        u, v = part.u[win], part.v[win]
        # In axes along and across the scratch, the distance from its centre line is a matter of one interpolation.
        along = (u - u0) * math.cos(heading) + (v - v0) * math.sin(heading)
        sideways = (u - u0) * across[0] + (v - v0) * across[1]
        where = along / length
        signed = sideways - np.interp(where, t, off).astype(np.float32) + 0.3 * rough[win]
        progress = np.clip((where - begin) / (end - begin), 0, 1)
        taper = np.minimum(np.minimum(progress * 7, (1 - progress) * 4), 1)
        pressure = 0.85 + 0.15 * np.sin(progress * rng.uniform(8, 22) + rng.uniform(0, 6.28)) + 0.22 * rough[win]
        width = half_width * (0.55 + 0.45 * taper)
        bright = np.exp(-((signed / width) ** 2))
        side = 1.0 if across[0] * part.lamp[0] + across[1] * part.lamp[1] > 0 else -1.0
        dark = np.exp(-(((signed - side * 2.1 * width) / (0.9 * width)) ** 2))
        plate[win] += taper * pressure * depth * (0.62 * bright - 0.24 * dark) * np.minimum(plate[win], 0.7)


def add_dent(rng, part, plate):
    """Presses a shallow dent into the plate: the slope away from the lamp is dark, the one that faces it is bright."""
    sigma = rng.uniform(10.0, 22.0)  # pixels; the visible width is about four times this
    aspect = rng.uniform(0.62, 1.0)
    turn = rng.uniform(0, math.pi)
    steepness = rng.uniform(0.45, 0.90)
    u0, v0 = part.place(rng, DEFECT_MARGIN + sigma)
    win = part.window(u0, v0, 4.2 * sigma)
    du, dv = part.u[win] - np.float32(u0), part.v[win] - np.float32(v0)
    c, s = math.cos(turn), math.sin(turn)
    a, b = (du * c + dv * s) / sigma, (dv * c - du * s) / (sigma * aspect)
    r2 = a * a + b * b
    la, lb = part.lamp[0] * c + part.lamp[1] * s, part.lamp[1] * c - part.lamp[0] * s
    # The hollow is flat-bottomed to a varying degree: its depth is exp(-r^p), and light follows the slope.
    power = rng.uniform(1.0, 1.9)
    hollow = np.exp(-((r2 / 1.7) ** power))
    slope = power * (r2 / 1.7 + 1e-4) ** (power - 1) * hollow * (a * la + b * lb / aspect) / 1.35
    rim = np.exp(-(((np.sqrt(r2) - 1.95) / 0.33) ** 2)) * (a * la + b * lb) / (np.sqrt(r2) + 0.2)
    shade = -steepness * slope + 0.16 * steepness * rim - 0.16 * steepness * hollow
    glint_a, glint_b = a + 0.95 * la, b + 0.95 * lb
    glint = np.exp(-(glint_a**2 + glint_b**2) / 0.11) * rng.uniform(0.0, 0.35) * steepness
    plate[win] *= np.clip(1.0 + 0.85 * shade + glint, 0.15, 1.75)


STAIN_COLOURS = [  # Fraction of the light that passes the stain, for red, green, blue.
    (0.58, 0.43, 0.24),  # oil
    (0.62, 0.36, 0.19),  # rust
    (0.40, 0.47, 0.56),  # dried coolant
    (0.36, 0.35, 0.33),  # grease
    (0.62, 0.56, 0.36),  # cutting fluid
]


def add_stain(rng, textures, part, picture):
    """Adds a stain to the plate: an uneven film with a ragged outline, a darker rim, and sometimes drops."""
    colour = np.array(STAIN_COLOURS[rng.integers(len(STAIN_COLOURS))]) * rng.uniform(0.85, 1.15)
    strength = rng.uniform(0.42, 0.90)
    radius = rng.uniform(19.0, 52.0)  # pixels
    edge = rng.uniform(1.5, 5.0)  # pixels over which the film ends
    rim_share = rng.uniform(0.0, 0.45)
    cloud = textures.cut(rng, textures.cloud)
    u0, v0 = part.place(rng, DEFECT_MARGIN + 0.45 * radius)
    blots = [(u0, v0, radius)]
    for _ in range(rng.poisson(1.4)):
        turn, reach = rng.uniform(0, 2 * math.pi), radius * rng.uniform(1.1, 1.7)
        blots.append((u0 + reach * math.cos(turn), v0 + reach * math.sin(turn), rng.uniform(3.0, 0.28 * radius)))
    win = part.window(u0, v0, 2.3 * radius + 12.0)
    film = np.zeros_like(part.u[win])
    for bu, bv, r in blots:
        du, dv = part.u[win] - np.float32(bu), part.v[win] - np.float32(bv)
        stretch, turn = rng.uniform(0.7, 1.0), rng.uniform(0, math.pi)
        a = du * math.cos(turn) + dv * math.sin(turn)
        b = (dv * math.cos(turn) - du * math.sin(turn)) / stretch
        bearing = np.arctan2(b, a)
        limit = np.full_like(a, r)
        for k in range(2, 7):
            limit += r * rng.normal(0, 0.16 / k**0.7) * np.cos(k * bearing + np.float32(rng.uniform(0, 6.28)))
        inward = limit - np.hypot(a, b) + 0.10 * r * cloud[win]
        body = np.clip(inward / edge, 0, 1)
        rim = np.exp(-(((inward - edge) / (0.8 * edge + 1.5)) ** 2))
        film = np.maximum(film, body * (1.0 - rim_share + 0.13 * cloud[win] + rim_share * rim))
    inside = np.clip(-part.outline()[0][win], 0, 1)  # The stain does not extend to the belt.
    film = np.clip(film * strength, 0, 0.95) * inside
    picture[win] *= 1.0 - film[..., None] * (1.0 - colour.astype(np.float32))


def draw(seed, split, index, class_index, textures):
    """Draws one camera picture of the given class.

    Returns it as 480 x 640 x 3 bytes of RGB, with a 480 x 640 mask of the pixels that the defect has changed.
    """
    rng = np.random.default_rng([seed, SPLITS[split], 1 + index])
    part = Part(rng)
    plate, distance = draw_plate(rng, textures, part)
    sound = plate.copy()
    if CLASSES[class_index] == "scratch":
        add_scratch(rng, textures, part, plate)
    elif CLASSES[class_index] == "dent":
        add_dent(rng, part, plate)

    touched = np.abs(plate - sound) > TOUCHED_FLOOR

    # The belt, with the shadow that the plate casts away from the lamp.
    reach = rng.uniform(6.0, 11.0)  # pixels
    belt = draw_belt(rng, textures)
    shadow = part.outline(-part.lamp[0] * reach, -part.lamp[1] * reach)[0]
    belt = belt * (1.0 - 0.62 * np.clip(0.5 - shadow / 12.0, 0, 1))

    warmth = rng.uniform(-0.02, 0.02)
    metal_tint = np.array([0.99 + warmth, 1.0, 1.015 - warmth], np.float32)
    belt_tint = np.array([0.94, 1.02, 0.98], np.float32) * (1.0 + np.float32(rng.uniform(-0.03, 0.03)))
    cover = np.clip(0.5 - distance * np.float32(part.scale), 0, 1)[..., None]
    picture = belt[..., None] * belt_tint
    picture += cover * (plate[..., None] * metal_tint - picture)
    if CLASSES[class_index] == "stain":
        sound = picture[..., 2].copy()
        add_stain(rng, textures, part, picture)
        touched = np.abs(picture[..., 2] - sound) > TOUCHED_FLOOR

    # The lens, the exposure and the sensor.
    exposure = rng.uniform(0.90, 1.10)
    tilt = 1.0 + rng.uniform(-0.05, 0.05) * (_X / FRAME_WIDTH - 0.5)
    tilt = tilt + rng.uniform(-0.05, 0.05) * (_Y / FRAME_HEIGHT - 0.5)
    vignette = (1.0 - rng.uniform(0.12, 0.26) * _CORNER_DISTANCE) * (exposure * tilt)
    picture *= vignette[..., None].astype(np.float32)
    noise = rng.standard_normal((FRAME_HEIGHT, FRAME_WIDTH), dtype=np.float32)
    picture += (rng.uniform(0.004, 0.010) * noise).astype(np.float32)[..., None]
    # A soft shoulder keeps the brightest places from clipping to plain white.
    picture = np.where(picture > 0.8, 0.8 + 0.2 * np.tanh((picture - 0.8) / 0.2), picture)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8), touched


def encode(pixels):
    """Returns the picture as JPEG bytes, as the camera would send it."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def preprocess(jpeg):
    """Returns the model's input as 128 x 128 x 3 bytes, as Lineside makes it: decode, centre crop, resize."""
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    return np.asarray(picture.resize((MODEL_SIDE, MODEL_SIDE), Image.Resampling.BILINEAR))


def cells_of(touched, class_index):
    """Returns the class of each cell of the network's last feature map; -1 if the cell is ambiguous and is ignored."""
    left = (FRAME_WIDTH - FRAME_HEIGHT) // 2
    size = FRAME_HEIGHT // CELLS
    square = touched[:, left : left + FRAME_HEIGHT].reshape(CELLS, size, CELLS, size)
    share = square.mean(axis=(1, 3))
    return np.where(share > CELL_SHARE, class_index, np.where(share > 0, -1, 0)).astype(np.int8)


def to_tensor(pixels):
    """Returns N x 3 x 128 x 128 floats, x = pixel / 255, from N x 128 x 128 x 3 bytes."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


_textures = {}


def draw_chunk(task):
    """Draws some pictures in a drawing process; returns their inputs, their cells and, if wanted, their JPEG bytes."""
    seed, split, start, labels, keep_jpeg = task
    if (seed, split) not in _textures:
        _textures[seed, split] = Textures(seed, split)
    inputs, cells, jpegs = [], [], []
    for index, label in enumerate(labels, start):
        pixels, touched = draw(seed, split, index, label, _textures[seed, split])
        jpeg = encode(pixels)
        inputs.append(preprocess(jpeg))
        cells.append(cells_of(touched, label))
        if keep_jpeg:
            jpegs.append(jpeg)
    return np.stack(inputs), np.stack(cells), jpegs


def draw_split(pool, seed, split, labels, keep_jpeg=False):
    """Draws a picture per label; returns inputs, cells and JPEG bytes, regardless of the number of processes."""
    started = time.monotonic()
    starts = range(0, len(labels), RENDER_CHUNK)
    tasks = [(seed, split, start, labels[start : start + RENDER_CHUNK], keep_jpeg) for start in starts]
    inputs, cells, jpegs = [], [], []
    for done, (some_inputs, some_cells, some_jpegs) in enumerate(pool.map(draw_chunk, tasks), 1):
        inputs.append(some_inputs)
        cells.append(some_cells)
        jpegs.extend(some_jpegs)
        if done % 20 == 0 or done == len(tasks):
            drawn = min(done * RENDER_CHUNK, len(labels))
            log(f"  {split}: {drawn} of {len(labels)} pictures drawn, {time.monotonic() - started:.0f} s")
    return np.concatenate(inputs), np.concatenate(cells), jpegs


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def initial_weights(seed):
    """Returns the weights to start from: He-initialised kernels (height, width, in, out), and the last linear layer.

    While training, the sum of every convolution is normalised over the batch, then scaled by `gain` and moved by
    `bias`. `fold` later puts the normalisation into the kernels, so that the exported model has none.
    """
    rng = np.random.default_rng([seed, len(SPLITS), 0])
    weights, channels = {}, 3
    for number, (out, _) in enumerate(LAYERS, 1):
        deviation = math.sqrt(2.0 / (KERNEL * KERNEL * channels))
        kernel = rng.standard_normal((KERNEL, KERNEL, channels, out)) * deviation
        weights[f"conv{number}.weight"] = kernel.astype(np.float32)
        weights[f"conv{number}.gain"] = np.ones(out, np.float32)
        weights[f"conv{number}.bias"] = np.zeros(out, np.float32)
        channels = out
    linear = rng.standard_normal((channels, len(CLASSES))) * math.sqrt(1.0 / channels)
    weights["linear.weight"] = linear.astype(np.float32)
    weights["linear.bias"] = np.zeros(len(CLASSES), np.float32)
    # A second linear layer that only helps in training; see `train`.
    weights["cells.weight"] = weights["linear.weight"].copy()
    weights["cells.bias"] = np.zeros(len(CLASSES), np.float32)
    return weights


def convolve(x, kernel, stride):
    """A 3x3 convolution of N x height x width x channels floats, padded with one ring of zeros."""
    import jax

    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=axes)


def pool(x):
    """The maxima of the patches of the feature map, averaged, so that small defects are not averaged out."""
    n, height, width, channels = x.shape
    patches = x.reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return patches.max(axis=(2, 4)).mean(axis=(1, 2))


def forward_in_training(weights, x):
    """The network with batch normalisation; returns logits, logits per cell, and the moments of every convolution."""
    import jax
    import jax.numpy as jnp

    moments = {}
    for number, (_, stride) in enumerate(LAYERS, 1):
        x = convolve(x, weights[f"conv{number}.weight"], stride)
        mean = x.mean(axis=(0, 1, 2))
        variance = jnp.square(x - mean).mean(axis=(0, 1, 2))
        moments[f"conv{number}"] = (mean, variance)
        scale = weights[f"conv{number}.gain"] * jax.lax.rsqrt(variance + NORMALISATION_FLOOR)
        x = jax.nn.relu((x - mean) * scale + weights[f"conv{number}.bias"])
    cell_logits = x @ weights["cells.weight"] + weights["cells.bias"]
    return pool(x) @ weights["linear.weight"] + weights["linear.bias"], cell_logits, moments


def fold(weights, moments):
    """Returns the weights of the plain network: the running means and variances put into kernels and biases."""
    folded = {name: np.asarray(value) for name, value in weights.items() if name.startswith("linear")}
    for number in range(1, len(LAYERS) + 1):
        mean, variance = (np.asarray(value) for value in moments[f"conv{number}"])
        scale = np.asarray(weights[f"conv{number}.gain"]) / np.sqrt(variance + np.float32(NORMALISATION_FLOOR))
        folded[f"conv{number}.weight"] = np.asarray(weights[f"conv{number}.weight"]) * scale
        folded[f"conv{number}.bias"] = np.asarray(weights[f"conv{number}.bias"]) - mean * scale
    return folded


def forward(weights, x):
    """The plain network on N x 128 x 128 x 3 floats: convolutions with ReLU, pooling, linear layer, no softmax."""
    import jax

    for number, (_, stride) in enumerate(LAYERS, 1):
        x = jax.nn.relu(convolve(x, weights[f"conv{number}.weight"], stride) + weights[f"conv{number}.bias"])
    return pool(x) @ weights["linear.weight"] + weights["linear.bias"]


def train(seed, pixels, labels, cells, epochs):
    """Trains with Adam and returns the weights of the plain network.

    The position of every drawn defect is known. Therefore a second linear layer, which is discarded afterwards, also
    predicts the class of each cell of the last feature map. This makes much better use of every picture.
    """
    import jax
    import jax.numpy as jnp

    steps_per_epoch = len(labels) // BATCH
    total = epochs * steps_per_epoch
    warm_up = max(1, int(total * WARM_UP))

    def cross_entropy(logits, y):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], axis=-1)[..., 0]

    def loss_of(weights, x, y, seen):
        logits, cell_logits, moments = forward_in_training(weights, x)
        weight = jnp.where(seen > 0, DEFECT_CELL_WEIGHT, jnp.where(seen == 0, 1.0, 0.0))
        cell_loss = (weight * cross_entropy(cell_logits, jnp.maximum(seen, 0))).sum() / weight.sum()
        loss = cross_entropy(logits, y).mean() + CELL_LOSS * cell_loss
        return loss, ((logits.argmax(axis=1) == y).mean(), moments)

    @jax.jit
    def step(weights, first, second, running, number, x, y, seen, gain):
        x = jnp.clip(x.astype(jnp.float32) / 255.0 * gain[:, None, None, None], 0.0, 1.0)
        (loss, (right, moments)), slope = jax.value_and_grad(loss_of, has_aux=True)(weights, x, y, seen)
        # An exponential average over the last steps; the plain average during the first steps.
        keep = jnp.minimum(RUNNING_SHARE, (number - 1) / number)
        running = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, running, moments)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((number - warm_up) / (total - warm_up), 0, 1)))
        rate = LEARNING_RATE * jnp.minimum(number / warm_up, 1.0) * cosine
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, slope)
        second = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, second, slope)

        def moved(w, m, s):
            update = (m / (1 - 0.9**number)) / (jnp.sqrt(s / (1 - 0.999**number)) + 1e-8)
            return w - rate * (update + (WEIGHT_DECAY * w if w.ndim > 1 else 0.0))

        return jax.tree.map(moved, weights, first, second), first, second, running, loss, right

    weights = initial_weights(seed)
    first = jax.tree.map(np.zeros_like, weights)
    second = jax.tree.map(np.zeros_like, weights)
    running = {f"conv{i}": (np.zeros(out, np.float32),) * 2 for i, (out, _) in enumerate(LAYERS, 1)}
    rng = np.random.default_rng([seed, len(SPLITS), 1])
    number, started = 0, time.monotonic()
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(labels))
        losses, rights = [], []
        for at in range(0, steps_per_epoch * BATCH, BATCH):
            chosen = order[at : at + BATCH]
            x, y, seen = pixels[chosen], labels[chosen], cells[chosen].astype(np.int32)
            # Mirrored parts are additional examples.
            sideways, upside = rng.random(BATCH) < 0.5, rng.random(BATCH) < 0.5
            x[sideways] = x[sideways, :, ::-1]
            x[upside] = x[upside, ::-1]
            seen[sideways] = seen[sideways, :, ::-1]
            seen[upside] = seen[upside, ::-1]
            gain = rng.uniform(1 - GAIN_JITTER, 1 + GAIN_JITTER, BATCH).astype(np.float32)
            number += 1
            weights, first, second, running, loss, right = step(
                weights, first, second, running, np.float32(number), x, y, seen, gain
            )
            losses.append(float(loss))
            rights.append(float(right))
        log(
            f"  epoch {epoch:2d} of {epochs}: loss {np.mean(losses):.4f}, "
            f"training accuracy {100 * np.mean(rights):.2f} %, {time.monotonic() - started:.0f} s"
        )
    return fold(weights, running)


def logits_by_jax(weights, pixels):
    """Returns the network's logits for N x 128 x 128 x 3 bytes, computed by jax."""
    import jax

    network = jax.jit(forward)
    parts = [
        np.asarray(network(weights, pixels[at : at + EVALUATION_BATCH].astype(np.float32) / np.float32(255)))
        for at in range(0, len(pixels), EVALUATION_BATCH)
    ]
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def export(weights, path):
    """Writes the weights as an ONNX model of plain operators."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    initializers, nodes, x = [], [], "image"

    def constant(name, value):
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype=np.float32), name))
        return name

    for number, (_, stride) in enumerate(LAYERS, 1):
        name = f"conv{number}"
        # ONNX stores kernels as out, in, height, width.
        kernel = constant(f"{name}.weight", weights[f"{name}.weight"].transpose(3, 2, 0, 1))
        bias = constant(f"{name}.bias", weights[f"{name}.bias"])
        nodes.append(
            helper.make_node(
                "Conv", [x, kernel, bias], [f"{name}.sum"], name=name,
                kernel_shape=[KERNEL, KERNEL], strides=[stride, stride], pads=[1, 1, 1, 1],
                dilations=[1, 1], group=1,
            )
        )  # fmt: skip
        x = f"{name}.out"
        nodes.append(helper.make_node("Relu", [f"{name}.sum"], [x], name=f"relu{number}"))
    nodes.append(
        helper.make_node("MaxPool", [x], ["patches.out"], name="patches", kernel_shape=[PATCH] * 2, strides=[PATCH] * 2)
    )
    nodes.append(helper.make_node("GlobalAveragePool", ["patches.out"], ["pool.out"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pool.out"], ["flatten.out"], name="flatten", axis=1))
    linear = [constant("linear.weight", weights["linear.weight"].T), constant("linear.bias", weights["linear.bias"])]
    nodes.append(helper.make_node("Gemm", ["flatten.out", *linear], ["logits"], name="linear", transB=1))

    graph = helper.make_graph(
        nodes,
        "surface-defects",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, MODEL_SIDE, MODEL_SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(CLASSES)])],
        initializers,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", ONNX_OPSET)],
        ir_version=ONNX_IR_VERSION,
        producer_name="Lineside surface-defects train.py",
        producer_version="1.0.0",
    )
    metadata = {
        "task": "classify",
        "names": repr(dict(enumerate(CLASSES))),
        "imgsz": repr([MODEL_SIDE, MODEL_SIDE]),
        "description": "Surface defects on brushed-metal parts, trained on drawn pictures. A demonstration.",
        "version": "1.0.0",
        "license": "MIT OR Apache-2.0",
        "author": "Lineside",
    }
    assert ast.literal_eval(metadata["names"])[0] == CLASSES[0]
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def open_session(path):
    """Opens the exported model in ONNX Runtime, on one processor thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def logits_by_onnxruntime(session, pixels):
    """Returns the exported model's logits for N x 128 x 128 x 3 bytes."""
    parts = [
        session.run(["logits"], {"image": to_tensor(pixels[at : at + EVALUATION_BATCH])})[0]
        for at in range(0, len(pixels), EVALUATION_BATCH)
    ]
    return np.concatenate(parts)


def softmax(logits):
    """Returns the probabilities per row, in double precision."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def macs_and_parameters():
    """Returns the multiply-adds of one inference and the number of weights."""
    side, channels, macs, parameters = MODEL_SIDE, 3, 0, 0
    for out, stride in LAYERS:
        side //= stride
        macs += side * side * KERNEL * KERNEL * channels * out
        parameters += KERNEL * KERNEL * channels * out + out
        channels = out
    return macs + channels * len(CLASSES), parameters + (channels + 1) * len(CLASSES)


def print_confusion(confusion):
    """Prints the confusion table: a row per true class, a column per predicted one."""
    log("  true \\ predicted " + "".join(f"{name:>9}" for name in CLASSES))
    for name, row in zip(CLASSES, confusion):
        log(f"  {name:>16} " + "".join(f"{count:9d}" for count in row))


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def equal_shares(count):
    """Returns `count` class numbers in turn, so that every class has the same share."""
    return [i % len(CLASSES) for i in range(count)]


def fresh_folder(path):
    """Returns the folder, new and empty."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def main():
    parser = argparse.ArgumentParser(
        description="Draw metal parts, train the surface-defects classifier, measure it, and export it as ONNX.",
        epilog="The exit status is 1 if the model does not meet the requirements. See the docstring of this script.",
    )
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--out", type=pathlib.Path, default=here, help="folder to write to (default: the script's own)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="start of all randomness (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the pictures (default: %(default)s)")
    parser.add_argument("--train-count", type=int, default=TRAIN_COUNT, help="training pictures (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="drawing processes (default: %(default)s)"
    )
    arguments = parser.parse_args()
    seed, out = arguments.seed, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    log("Drawing.")
    train_labels, held_out_labels = equal_shares(arguments.train_count), equal_shares(HELD_OUT_COUNT)
    frame_labels = [c for c, share in enumerate(FRAME_SHARES) for _ in range(share)]
    np.random.default_rng([seed, SPLITS["frames"], 0, 1]).shuffle(frame_labels)
    golden_labels = list(range(len(CLASSES)))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        frame_inputs, _, frame_jpegs = draw_split(pool, seed, "frames", frame_labels, keep_jpeg=True)
        _, _, golden_jpegs = draw_split(pool, seed, "golden", golden_labels, keep_jpeg=True)
        held_out_inputs, _, _ = draw_split(pool, seed, "held-out", held_out_labels)
        train_inputs, train_cells, _ = draw_split(pool, seed, "train", train_labels)
    drawing_seconds = time.monotonic() - started

    log("Training.")
    training_started = time.monotonic()
    weights = train(seed, train_inputs, np.array(train_labels, np.int32), train_cells, arguments.epochs)
    training_seconds = time.monotonic() - training_started

    log("Exporting and measuring.")
    model_path = out / "surface-defects.onnx"
    export(weights, model_path)
    session = open_session(model_path)
    truth = np.array(held_out_labels)
    by_jax = logits_by_jax(weights, held_out_inputs)
    by_onnx = logits_by_onnxruntime(session, held_out_inputs)
    difference = float(np.abs(by_jax - by_onnx).max())
    accuracy_by_jax = float((by_jax.argmax(axis=1) == truth).mean())
    accuracy = float((by_onnx.argmax(axis=1) == truth).mean())
    confusion = np.zeros((len(CLASSES), len(CLASSES)), int)
    np.add.at(confusion, (truth, by_onnx.argmax(axis=1)), 1)
    right_share = softmax(by_onnx)[np.arange(len(truth)), truth]
    frame_answers = logits_by_onnxruntime(session, frame_inputs).argmax(axis=1)
    frames_right = int((frame_answers == np.array(frame_labels)).sum())
    model_bytes = model_path.read_bytes()
    macs, parameters = macs_and_parameters()
    assert parameters == sum(value.size for value in weights.values())
    frames_bytes = sum(len(jpeg) for jpeg in frame_jpegs)

    log(f"  held-out accuracy {100 * accuracy:.2f} % by ONNX Runtime, {100 * accuracy_by_jax:.2f} % by jax")
    log(f"  largest difference between a logit of the two: {difference:.2e}")
    log(f"  probability of the correct class: above 0.9 for {100 * (right_share > 0.9).mean():.2f} % of the pictures")
    log(f"  frames correct: {frames_right} of {len(frame_labels)}, {frames_bytes} bytes")
    log(f"  model: {parameters} parameters, {len(model_bytes)} bytes, {macs / 1e6:.2f} million multiply-adds")
    print_confusion(confusion)

    failures = []
    if accuracy < ACCURACY_FLOOR:
        failures.append(f"The held-out accuracy is below {100 * ACCURACY_FLOOR:.0f} %.")
    if accuracy != accuracy_by_jax or difference > LOGIT_TOLERANCE:
        failures.append("The outputs of ONNX Runtime and jax differ.")
    if len(model_bytes) > MODEL_BYTES_LIMIT:
        failures.append("The model file is too large.")
    if frames_bytes > FRAMES_BYTES_LIMIT:
        failures.append("The frames are too large.")

    folder = fresh_folder(out / "frames")
    for number, (label, jpeg) in enumerate(zip(frame_labels, frame_jpegs), 1):
        (folder / f"part-{number:03d}-{CLASSES[label]}.jpg").write_bytes(jpeg)

    folder = fresh_folder(out / "golden")
    for label, jpeg in zip(golden_labels, golden_jpegs):
        # As a batch of one and from the bytes of the file, as in Lineside.
        logits = logits_by_onnxruntime(session, preprocess(jpeg)[None])
        scores = softmax(logits)[0]
        classes = [
            {"label": CLASSES[c], "class": int(c), "score": round(float(scores[c]), 9)} for c in np.argsort(-scores)
        ]
        outputs = [{"name": "logits", "shape": list(logits.shape), "data": [float(x) for x in logits.ravel()]}]
        (folder / f"{CLASSES[label]}.jpg").write_bytes(jpeg)
        answer = {"outputs": outputs, "classes": classes}
        (folder / f"{CLASSES[label]}.json").write_text(json.dumps(answer, indent=2) + "\n")
        if classes[0]["class"] != label:
            failures.append(f"The golden sample of class {CLASSES[label]} is classified as {classes[0]['label']}.")

    report = {
        "seed": seed,
        "classes": CLASSES,
        "trainPictures": len(train_labels),
        "heldOutPictures": len(held_out_labels),
        "epochs": arguments.epochs,
        "heldOutAccuracy": round(accuracy, 6),
        "heldOutAccuracyByJax": round(accuracy_by_jax, 6),
        "confusion": {name: dict(zip(CLASSES, map(int, row))) for name, row in zip(CLASSES, confusion)},
        "rightClassProbability": {
            "mean": round(float(right_share.mean()), 6),
            "median": round(float(np.median(right_share)), 6),
            "shareAbove0.9": round(float((right_share > 0.9).mean()), 6),
        },
        "largestLogitDifference": difference,
        "frames": len(frame_labels),
        "framesRight": frames_right,
        "framesBytes": frames_bytes,
        "modelBytes": len(model_bytes),
        "modelSha256": hashlib.sha256(model_bytes).hexdigest(),
        "parameters": parameters,
        "multiplyAdds": macs,
        "drawingSeconds": round(drawing_seconds),
        "trainingSeconds": round(training_seconds),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    log(f"Written to {out}. {time.monotonic() - started:.0f} s in all.")
    for failure in failures:
        log(f"Failed: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
