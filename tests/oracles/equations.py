"""The paper's equations as slow, simple loops in float64, to test the package.

No code is shared with the package. Each function follows the printed equation, not a
rewritten form, so that an algebra error in the package gives a difference. Frame: a
point is (x, y); -1 and +1 are the centres of the first and the last pixel.
"""

import math

import numpy as np


def regular_grid(size):
    """Returns G as [h, w, 2]: `size` = (h, w) evenly spaced points, each (x, y)."""
    h, w = size
    grid = np.zeros((h, w, 2))
    for i in range(h):
        for j in range(w):
            grid[i, j] = -1 + 2 * j / (w - 1), -1 + 2 * i / (h - 1)
    return grid


def affine_grid(theta, size):
    """[b, 2, 3] -> [b, h, w, 2]: theta times (x, y, 1), point by point. Eq. (2)."""
    g = regular_grid(size)
    out = np.zeros((len(theta), *size, 2))
    for b in range(len(theta)):
        for i in range(size[0]):
            for j in range(size[1]):
                x, y = g[i, j]
                for row in range(2):
                    t = theta[b][row]
                    out[b, i, j, row] = t[0] * x + t[1] * y + t[2] * 1
    return out


def attention_matrix(gamma_res):
    """Returns the 2 x 3 matrix of one image's four attention parameters. Eq. (4)."""
    g1, g2, g3, g4 = (float(g) for g in gamma_res)
    return np.array(
        [
            [g3 * math.cos(g4), -g3 * math.sin(g4), g1],
            [g3 * math.sin(g4), g3 * math.cos(g4), g2],
        ]
    )


def attention_grid(gamma_res, size):
    """[b, 4] -> [b, h, w, 2]. Eq. (4)."""
    return affine_grid([attention_matrix(g) for g in gamma_res], size)


def covered(point, gamma_res):
    """Returns whether `point` lies in the image of the square [-1, 1]^2 under Eq. (4).

    Solves the 2 x 2 system for the (u, v) that the matrix maps to `point`. A matrix of
    scale 0 maps the whole square to one point and covers only that point.
    """
    matrix = attention_matrix(gamma_res)
    offset = np.asarray(point, np.float64) - matrix[:, 2]
    if gamma_res[2] == 0:
        return bool(np.all(offset == 0))
    u, v = np.linalg.solve(matrix[:, :2], offset)
    return bool(abs(u) <= 1 and abs(v) <= 1)


def edge_distance(point, gamma_res):
    """Returns the distance of `point` to the attention's outline, along its axes.

    Tests use it to skip ties, which depend on rounding.
    """
    g1, g2, g3, g4 = (float(g) for g in gamma_res)
    x, y = point[0] - g1, point[1] - g2
    across = abs(x * math.cos(g4) + y * math.sin(g4)) - abs(g3)
    down = abs(-x * math.sin(g4) + y * math.cos(g4)) - abs(g3)
    return min(abs(across), abs(down))


def redundancy(gamma_res, size):
    """Returns bool [b, h, w]: True at the points of G that stay. Eq. (5)."""
    g = regular_grid(size)
    stays = np.zeros((len(gamma_res), *size), bool)
    for b in range(len(gamma_res)):
        for i in range(size[0]):
            for j in range(size[1]):
                stays[b, i, j] = not covered(g[i, j], gamma_res[b])
    return stays


def restrict(gamma, alpha_p=1.0, alpha_s=0.5, inside=False):
    """[..., 4] -> [..., 4]. Eq. (6).

    `inside`: the position is also bounded by the distance between the image border and
    the corners of an attention in the centre. (Not in the paper.)
    """
    gamma = np.asarray(gamma, np.float64)
    out = np.zeros_like(gamma)
    for index in np.ndindex(*gamma.shape[:-1]):
        g1, g2, g3, g4 = gamma[index]
        bound = alpha_p
        if inside:
            middle = attention_grid([[0, 0, alpha_s * math.tanh(g3), g4]], (2, 2))
            bound = min(alpha_p, 1 - np.abs(middle).max())
        out[index] = (
            bound * math.tanh(g1),
            bound * math.tanh(g2),
            alpha_s * math.tanh(g3),
            g4,
        )
    return out


def bilinear_sample(image, grid):
    """[b, H, W, c], [b, h, w, 2] -> [b, h, w, c]: the sum over every pixel.

    Source: Jaderberg et al. 2015, Eq. (5): sum over m, n of U[n, m] times
    max(0, 1 - |x - m|) max(0, 1 - |y - n|). The paper samples as they do.
    """
    image = np.asarray(image, np.float64)
    grid = np.asarray(grid, np.float64)
    batch, height, width, channels = image.shape
    h, w = grid.shape[1:3]
    out = np.zeros((batch, h, w, channels))
    for b in range(batch):
        for i in range(h):
            for j in range(w):
                x = (grid[b, i, j, 0] + 1) / 2 * (width - 1)
                y = (grid[b, i, j, 1] + 1) / 2 * (height - 1)
                for n in range(height):
                    for m in range(width):
                        kernel = max(0, 1 - abs(x - m)) * max(0, 1 - abs(y - n))
                        out[b, i, j] += kernel * image[b, n, m]
    return out


def restriction_loss(
    gamma_res,
    expectation=(0, 0, 0.5, 0),
    threshold=(0.4, 0.4, 0.4, math.pi),
    eps=1e-300,
):
    """[b, 4] -> [b]. Eq. (7), with an eps that is negligible beside any excess."""
    out = np.zeros(len(gamma_res))
    for b in range(len(gamma_res)):
        total = 0.0
        for g, e, t in zip(gamma_res[b], expectation, threshold, strict=True):
            excess = abs(float(g) - e) - t
            total += max(0, excess) / (excess + eps) * (float(g) - e) ** 2
        out[b] = math.sqrt(total)
    return out


def distance(p, q, squared=False):
    """Returns the (squared) Euclidean distance of two vectors."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        total += (float(a) - float(b)) ** 2
    return total if squared else math.sqrt(total)


def contrastive_loss(
    attention_m, attention_n, redundancy_m, redundancy_n, margin=0.7, squared=False
):
    """Four [p, d] -> [p]. Eq. (8)."""
    out = np.zeros(len(attention_m))
    for k in range(len(attention_m)):
        am, an = attention_m[k], attention_n[k]
        rm, rn = redundancy_m[k], redundancy_n[k]
        first = distance(rm, rn, squared) - distance(rm, am, squared) + margin
        second = distance(rn, rm, squared) - distance(rn, an, squared) + margin
        out[k] = max(first, 0) + max(second, 0)
    return out


def smoothed_cross_entropy(scores, label, smoothing):
    """Szegedy et al., 2016: cross-entropy against (1 - s) one-hot + s / K."""
    exp = [math.exp(score) for score in scores]
    loss = 0.0
    for k, value in enumerate(exp):
        wanted = smoothing / len(exp) + (1 - smoothing if k == label else 0)
        loss -= wanted * math.log(value / sum(exp))
    return loss


def learning_rate(epoch, base=1e-3, first_epochs=50, period_epochs=45, factor=0.1):
    """Returns the rate of an epoch, counted from 0, by a loop over the epochs.

    Source: Sec. 4.1: base, a decay after 50 epochs, then one for every 45 epochs.
    """
    rate, next_decay = base, first_epochs
    for now in range(epoch + 1):
        if now == next_decay:
            rate *= factor
            next_decay += period_epochs
    return rate


def cosine_learning_rate(step, total, base, warm):
    """Loshchilov and Hutter, 2017, Eq. (5), after `warm` steps of linear warm-up."""
    if step < warm:
        return base * (step + 1) / warm
    return base * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def restriction_weight(epoch, first_epochs=50, period_epochs=45):
    """Returns 1.0 in the epochs with L_res and 0.0 in those without.

    Source: Sec. 4.1: after the first 50 epochs, off for 45, on for 45, and so on.
    """
    weight, next_switch = 1.0, first_epochs
    for now in range(epoch + 1):
        if now == next_switch:
            weight = 1.0 - weight
            next_switch += period_epochs
    return weight


def full_protocol(features, window, weight, bias):
    """[h, w, c] features of one whole image -> [k] scores, averaged over positions.

    Every `window` x `window` part of the feature map is mean-pooled and classified
    (`weight` [c, k], `bias` [k]); the function returns the mean of the outputs.

    Source: Sec. 4.3: "average the final prediction scores" without cropping.
    """
    features = np.asarray(features, np.float64)
    h, w, channels = features.shape
    scores = []
    for top in range(h - window + 1):
        for left in range(w - window + 1):
            pooled = np.zeros(channels)
            for i in range(top, top + window):
                for j in range(left, left + window):
                    pooled += features[i, j]
            scores.append(pooled / window**2 @ np.asarray(weight) + np.asarray(bias))
    return sum(scores) / len(scores)


def redundancy_weight(gamma_res, size, softness):
    """Returns [b, h, w]: Eq. (5) with a logistic curve for each of the four edges."""
    g = regular_grid(size)
    out = np.zeros((len(gamma_res), *size))
    for b in range(len(gamma_res)):
        g1, g2, g3, g4 = (float(x) for x in gamma_res[b])
        for i in range(size[0]):
            for j in range(size[1]):
                x, y = g[i, j, 0] - g1, g[i, j, 1] - g2
                u = x * math.cos(g4) + y * math.sin(g4)
                v = -x * math.sin(g4) + y * math.cos(g4)
                inside_u = 1 / (1 + math.exp(-(abs(g3) - abs(u)) / softness))
                inside_v = 1 / (1 + math.exp(-(abs(g3) - abs(v)) / softness))
                out[b, i, j] = 1 - inside_u * inside_v
    return out
