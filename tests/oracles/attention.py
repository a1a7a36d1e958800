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


def spatial_gamma(
    features, weights, *, kernel, bias, gain, rows, columns, normalized=True
):
    """Returns Gamma of the spatial head for one image, by a loop over the cells.

    `features` [h, w, c]; `weights` [c] for the scores of cells; `kernel` [c, 2] for
    scale and angle; `bias` [4]; `gain` [2]; `rows` [h], `columns` [w]: cell centres.
    """
    features = np.asarray(features, np.float64)
    height, width, channels = features.shape
    cells = [(i, j) for i in range(height) for j in range(width)]
    pooled = [sum(features[i, j, c] for i, j in cells) for c in range(channels)]
    pooled = np.array(pooled) / len(cells)
    length = float(np.sqrt(sum(x * x for x in pooled))) if normalized else 1.0
    scores = []
    for i, j in cells:
        product = sum(features[i, j, c] * weights[c] for c in range(channels))
        scores.append(4 * product / length)
    exponentials = [np.exp(z - max(scores)) for z in scores]
    gamma = [float(b) for b in bias]
    for axis, places in enumerate(
        ([columns[j] for _, j in cells], [rows[i] for i, _ in cells])
    ):
        middle = sum(places) / len(cells)
        for exponential, place in zip(exponentials, places, strict=True):
            share = exponential / sum(exponentials)
            gamma[axis] += gain[axis] * share * (place - middle)
    for k in (0, 1):
        gamma[2 + k] += sum(pooled[c] / length * kernel[c][k] for c in range(channels))
    return np.array(gamma)


def contains(matrix, point_px, crop):
    """Returns whether a point is in the image of [-1, 1]^2 under a matrix."""
    frame = np.asarray(point_px, np.float64) * 2 / (crop - 1) - 1
    matrix = np.asarray(matrix, np.float64)
    u, v = np.linalg.solve(matrix[:, :2], frame - matrix[:, 2])
    return bool(abs(u) <= 1 and abs(v) <= 1)
