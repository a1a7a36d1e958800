"""The swap and the filled redundancy, by loops over pixels in float64."""

import numpy as np

from tests.oracles import equations


def beside(point, gamma_res):
    """Mirrors a point at the edges of the widest strip beside an attention."""
    corners = equations.attention_grid([gamma_res], (2, 2))[0].reshape(4, 2)
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    strips = [(0, right, 1), (0, -1, left), (1, bottom, 1), (1, -1, top)]
    axis, start, end = max(strips, key=lambda strip: round(strip[2] - strip[1], 9))
    place = list(point)
    while not start - 1e-12 <= place[axis] <= end + 1e-12:
        edge = start if place[axis] < start else end
        place[axis] = 2 * edge - place[axis]
    return place


def redundancy(image, gamma_res, size):
    """[H, W, c], [4] -> [h, w, c]: the image, with the attention filled from beside."""
    grid = equations.regular_grid(size)
    for i, j in np.ndindex(*size):
        if equations.covered(grid[i, j], gamma_res):
            grid[i, j] = beside(grid[i, j], gamma_res)
    return equations.bilinear_sample(image[None], grid[None])[0]


def swap(target, target_gamma, source, gamma, *, place):
    """[H, W, c], [4], [H, W, c], [4] -> [H, W, c]: source pasted into target."""
    out = np.array(target, np.float64)
    grid = equations.regular_grid(out.shape[:2])
    for i, j in np.ndindex(*out.shape[:2]):
        point = grid[i, j]
        if place == "neighbour" and equations.covered(point, target_gamma):
            moved = np.clip(point - target_gamma[:2] + gamma[:2], -1, 1)
            out[i, j] = equations.bilinear_sample(source[None], moved[None, None, None])
        elif place == "own" and equations.covered(point, gamma):
            out[i, j] = source[i, j]
        elif place == "own" and equations.covered(point, target_gamma):
            moved = np.array(beside(point, target_gamma))
            out[i, j] = equations.bilinear_sample(target[None], moved[None, None, None])
    return out
