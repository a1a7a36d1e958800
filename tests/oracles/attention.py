"""Class activations and overlaps of attention, computed by counting points."""

import numpy as np


def class_activation(features, kernel, chosen):
    """[h, w, c], [c, k], class -> [h, w]: the class's weights at each place."""
    height, width, channels = features.shape
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            for c in range(channels):
                out[i, j] += float(features[i, j, c]) * float(kernel[c, chosen])
    return out


def share_inside(activation, box, rows, columns, crop, fine=20):
    """Returns the share of positive activation in a box, on fine**2 points a pixel."""
    points = (np.arange(crop * fine) + 0.5) / fine - 0.5
    inside = total = 0.0
    for y in points:
        i = int(np.abs(np.asarray(rows) - y).argmin())
        for x in points:
            j = int(np.abs(np.asarray(columns) - x).argmin())
            value = max(0.0, float(activation[i, j]))
            total += value
            if box[0] <= x <= box[2] and box[1] <= y <= box[3]:
                inside += value
    return inside / total


def iou(matrix, box, crop, lattice):
    """Returns the IoU of a box and the image of [-1, 1]^2 under a matrix.

    `lattice` [n, 2]: points in pixels, evenly spread over a region around both.
    """
    matrix = np.asarray(matrix, np.float64)
    both = either = 0
    for x, y in lattice:
        frame = np.array([x, y]) * 2 / (crop - 1) - 1
        u, v = np.linalg.solve(matrix[:, :2], frame - matrix[:, 2])
        attended = abs(u) <= 1 and abs(v) <= 1
        boxed = box[0] <= x <= box[2] and box[1] <= y <= box[3]
        both += attended and boxed
        either += attended or boxed
    return both / either
